"""The published sampling loops as baselines: one request at a time, greedy, as their evaluation code has them.

- LLaDA: Llama under other tensor names and without the causal mask. Each step runs all rows through all layers and the
  head, takes softmax and argmax over [1, N, V], and commits the quota of the current block. Nothing is cached.
- SDAR: transformers' Qwen3 with its key-value cache. The prompt's whole blocks run once; each block runs once per step
  and once more to be kept.
- LLaDA2: see llada2_loop.py.
"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file

#: positions of a block -> token, probability
Guess = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: in this order: `transformer.ff_out` is the head, a block's `ff_out` the down projection
LLAMA_NAMES = {
    "model.transformer.ff_out.": "lm_head.",
    "model.transformer.wte.": "model.embed_tokens.",
    "model.transformer.ln_f.": "model.norm.",
    "model.transformer.blocks.": "model.layers.",
    ".attn_norm.": ".input_layernorm.",
    ".ff_norm.": ".post_attention_layernorm.",
    ".q_proj.": ".self_attn.q_proj.",
    ".k_proj.": ".self_attn.k_proj.",
    ".v_proj.": ".self_attn.v_proj.",
    ".attn_out.": ".self_attn.o_proj.",
    ".ff_proj.": ".mlp.gate_proj.",
    ".up_proj.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
}
QWEN3_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
)


def quotas(masks: int, steps: int) -> list[int]:
    """An even split; the first steps take the remainder."""
    return [masks // steps + (step < masks % steps) for step in range(steps)]


def fill(tokens: torch.Tensor, guess: Guess, mask_id: int, steps: int) -> Iterator[None]:
    """Fills the masks of a block [B] in place, the most confident ones first. Quotas are those of the whole block,
    of which the prompt may hold a part."""
    for quota in quotas(len(tokens), steps):
        masked = tokens == mask_id
        if not masked.any():
            return
        best, confidence = guess(tokens)
        chosen = confidence.masked_fill(~masked, -torch.inf).topk(min(quota, int(masked.sum()))).indices
        tokens[chosen] = best[chosen]
        yield


def most_probable(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, token = logits.float().softmax(-1).max(-1)
    return token, confidence


def block_mask(rows: torch.Tensor, keys: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, T, keys], added to scores: a row sees its own block and everything before it."""
    hidden = torch.arange(keys) >= (rows[:, None] // block + 1) * block
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


class Loop:
    """`generate_steps` yields after every step the response [new] as it is, the same tensor each time."""

    mask_id: int

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """Under the hub's names; random ones, until some are loaded"""
        raise NotImplementedError

    def generate_steps(self, prompt: list[int], new: int, block: int, steps: int) -> Iterator[torch.Tensor]:
        """`steps` of each block"""
        raise NotImplementedError

    def generate(self, prompt: list[int], new: int, block: int, steps: int) -> list[int]:
        *_, response = self.generate_steps(prompt, new, block, steps)
        return response.tolist()

    def canvas(self, prompt: list[int], length: int) -> torch.Tensor:
        return torch.tensor(prompt + [self.mask_id] * (length - len(prompt)))


class LLaDA(Loop):
    def __init__(self, config: dict, dtype: torch.dtype):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.mask_id = config["mask_token_id"]
        llama = LlamaConfig(
            hidden_size=config["d_model"],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config["n_kv_heads"],
            intermediate_size=config["mlp_hidden_size"],
            vocab_size=config["embedding_size"],
            max_position_embeddings=config["max_sequence_length"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            tie_word_embeddings=config["weight_tying"],
            is_causal=False,
            attn_implementation="sdpa",
        )
        self.model = LlamaForCausalLM(llama).to(dtype).eval()
        for layer in self.model.model.layers:
            # Together with the config's is_causal this means no mask at all, the fastest way to see everything.
            layer.self_attn.is_causal = False

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict({llama_name(name): tensor for name, tensor in weights.items()})

    def weights(self) -> dict[str, torch.Tensor]:
        names = {ours: theirs for theirs, ours in LLAMA_NAMES.items()}

        def hub_name(name: str) -> str:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs, 1)
            return name

        return {hub_name(name): tensor for name, tensor in self.model.state_dict().items()}

    @torch.inference_mode()
    def generate_steps(self, prompt: list[int], new: int, block: int, steps: int) -> Iterator[torch.Tensor]:
        canvas = self.canvas(prompt, len(prompt) + new)
        for start in range(len(prompt), len(canvas), block):
            own = slice(start, start + block)

            def guess(_, own=own) -> tuple[torch.Tensor, torch.Tensor]:
                logits = self.model(canvas[None], use_cache=False).logits  # [1, N, V]
                token = logits.argmax(-1)
                confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]  # [1, N]
                return token[0, own], confidence[0, own]

            for _ in fill(canvas[own], guess, self.mask_id, steps):
                yield canvas[len(prompt) :]


def llama_name(name: str) -> str:
    for theirs, ours in LLAMA_NAMES.items():
        name = name.replace(theirs, ours, 1)
    return name


class Sdar(Loop):
    def __init__(self, config: dict, dtype: torch.dtype):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        own = {name: config[name] for name in QWEN3_FIELDS}
        rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        scale = {"initializer_range": config.get("initializer_range", 0.02)}
        qwen3 = Qwen3Config(**own, **scale, attn_implementation="sdpa", rope_parameters=rope)
        self.model = Qwen3ForCausalLM(qwen3).to(dtype).eval()
        self.mask_id, self.dtype, self.tied = config["mask_token_id"], dtype, config["tie_word_embeddings"]

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(weights, strict=not self.tied)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    @torch.inference_mode()
    def generate_steps(self, prompt: list[int], new: int, block: int, steps: int) -> Iterator[torch.Tensor]:
        from transformers import DynamicCache

        whole, length = len(prompt) // block * block, -(-(len(prompt) + new) // block) * block
        tokens, cache = self.canvas(prompt, length), DynamicCache()
        if whole:
            self._forward(tokens[:whole], 0, cache, block_mask(torch.arange(whole), whole, block, self.dtype))
        for start in range(whole, length, block):
            own = tokens[start : start + block]

            def guess(now: torch.Tensor, start=start) -> tuple[torch.Tensor, torch.Tensor]:
                logits = self._forward(now, start, cache)
                cache.crop(start)
                return most_probable(logits)

            for _ in fill(own, guess, self.mask_id, steps):
                yield tokens[len(prompt) : len(prompt) + new]
            self._forward(own, start, cache)  # keeps its keys and values
        yield tokens[len(prompt) : len(prompt) + new]

    def _forward(self, ids: torch.Tensor, start: int, cache, mask: torch.Tensor | None = None) -> torch.Tensor:
        """-> logits [T, V]"""
        end = start + len(ids)
        mask = torch.zeros(1, 1, len(ids), end, dtype=self.dtype) if mask is None else mask
        positions = torch.arange(start, end)[None]
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self.model(ids[None], **given).logits[0]


def loop_of(config: dict, dtype: torch.dtype) -> Loop:
    from benchmarks.lib.llada2_loop import LLaDA2

    loops = {"LLaDAModelLM": LLaDA, "SDARForCausalLM": Sdar, "LLaDA2MoeModelLM": LLaDA2}
    return loops[config["architectures"][0]](config, dtype)


def load(folder: Path, dtype: torch.dtype) -> Loop:
    loop = loop_of(json.loads((folder / "config.json").read_text()), dtype)
    loop.load(load_file(folder / "model.safetensors"))
    return loop


def seconds_of(loop: Loop, prompt: list[int], new: int, block: int, steps: int, most: int | None = None) -> float:
    """Seconds of `steps` steps per block, at most the first `most` ones."""
    begin = time.perf_counter()
    for _ in islice(loop.generate_steps(prompt, new, block, steps), most):
        pass
    return time.perf_counter() - begin


def random_weights(config: dict, dtype: str) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, under the hub's names."""
    torch.manual_seed(0)
    weights = loop_of(config, torch.float32).weights()
    return {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()}
