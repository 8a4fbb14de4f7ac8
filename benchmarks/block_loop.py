"""The baselines of models that know blocks: their published loops, one request at a time.

SDAR's runs on transformers' Qwen3 with its key-value cache: the prompt's whole
blocks once, then each block a few times and once more to be kept. LLaDA2's
has no cache: each step runs everything up to the end of the block. Both as
their evaluation code has them, greedy.

As a program (`python -m benchmarks.block_loop`, a job as JSON on stdin, results
as JSON lines on stdout) it measures itself in a process of its own.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

#: of a block's positions: token, probability
Guess = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def sees(rows: torch.Tensor, keys: int, block: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, 1, T, keys] added to scores: a row sees its own block and all before it"""
    hidden = torch.arange(keys) >= (rows[:, None] // block + 1) * block
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def fill(tokens: torch.Tensor, guess: Guess, mask_id: int, steps: int) -> None:
    """The masks of a block [B], in place, the surest ones of each step"""
    quotas = [len(tokens) // steps + (step < len(tokens) % steps) for step in range(steps)]
    for quota in quotas:
        masked = tokens == mask_id
        if not masked.any():
            return
        best, confidence = guess(tokens)
        chosen = confidence.masked_fill(~masked, -torch.inf).topk(min(quota, int(masked.sum()))).indices
        tokens[chosen] = best[chosen]


def most_probable(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, token = logits.float().softmax(-1).max(-1)
    return token, confidence


class Sdar:
    def __init__(self, folder: Path, dtype: torch.dtype):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        hub = json.loads((folder / "config.json").read_text())
        names = (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
        )  # fmt: skip
        config = Qwen3Config(
            **{name: hub[name] for name in names}, attn_implementation="sdpa",
            rope_parameters={"rope_type": "default", "rope_theta": hub["rope_theta"]},
        )  # fmt: skip
        self.model = Qwen3ForCausalLM(config).to(dtype).eval()
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=not hub["tie_word_embeddings"])
        self.mask_id, self.dtype = hub["mask_token_id"], dtype

    @torch.inference_mode()
    def generate(self, prompt: list[int], new: int, block: int, steps: int) -> list[int]:
        from transformers import DynamicCache

        whole, length = len(prompt) // block * block, -(-(len(prompt) + new) // block) * block
        tokens = torch.full((length,), self.mask_id)
        tokens[: len(prompt)] = torch.tensor(prompt)
        cache = DynamicCache()
        if whole:
            self._forward(tokens[:whole], 0, cache, sees(torch.arange(whole), whole, block, self.dtype))
        for start in range(whole, length, block):
            own = slice(start, start + block)

            def guess(now: torch.Tensor, start=start) -> tuple[torch.Tensor, torch.Tensor]:
                logits = self._forward(now, start, cache)
                cache.crop(start)
                return most_probable(logits)

            fill(tokens[own], guess, self.mask_id, steps)
            self._forward(tokens[own], start, cache)  # keeps its keys and values
        return tokens[len(prompt) : len(prompt) + new].tolist()

    def _forward(self, ids: torch.Tensor, start: int, cache, mask: torch.Tensor | None = None) -> torch.Tensor:
        """-> logits [T, V]"""
        end = start + len(ids)
        mask = torch.zeros(1, 1, len(ids), end, dtype=self.dtype) if mask is None else mask
        positions = torch.arange(start, end)[None]
        return self.model(
            ids[None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[0]


class LLaDA2:
    """The hub's code in plain torch: experts one after the other, each over its rows."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {
            name: tensor if "mlp.gate" in name and "proj" not in name else tensor.to(dtype)
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.mask_id, self.dtype = self.config["mask_token_id"], dtype

    @torch.inference_mode()
    def generate(self, prompt: list[int], new: int, block: int, steps: int) -> list[int]:
        first, length = len(prompt) // block * block, -(-(len(prompt) + new) // block) * block
        tokens = torch.full((length,), self.mask_id)
        tokens[: len(prompt)] = torch.tensor(prompt)
        for start in range(first, length, block):
            end = start + block
            mask = sees(torch.arange(end), end, block, self.dtype)

            def guess(_, end=end, mask=mask, start=start) -> tuple[torch.Tensor, torch.Tensor]:
                return most_probable(self.forward(tokens[:end], mask)[start:end])

            fill(tokens[start:end], guess, self.mask_id, steps)
        return tokens[len(prompt) : len(prompt) + new].tolist()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """-> logits [T, V]"""
        config = self.config
        heads, kv_heads, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        turned = int(dim * config["partial_rotary_factor"])
        angles = torch.outer(
            torch.arange(len(ids)).float(), config["rope_theta"] ** -(torch.arange(0, turned, 2).float() / turned)
        )
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x = self.weights["model.word_embeddings.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            own = f"model.layers.{layer}"
            h = self._normed(x, f"{own}.input_layernorm")
            qkv = self._linear(h, f"{own}.attention.query_key_value").unflatten(-1, (-1, dim)).transpose(0, 1)
            q, k, v = qkv.split([heads, kv_heads, kv_heads])
            q = rotated(self._normed(q, f"{own}.attention.query_layernorm"), cos, sin)
            k = rotated(self._normed(k, f"{own}.attention.key_layernorm"), cos, sin)
            mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
            x = x + self._linear(mixed.transpose(0, 1).flatten(1), f"{own}.attention.dense")
            h = self._normed(x, f"{own}.post_attention_layernorm")
            sparse = layer >= config["first_k_dense_replace"]
            x = x + (self._experts(h, f"{own}.mlp") if sparse else self._gated(h, f"{own}.mlp"))
        return self._linear(self._normed(x, "model.norm"), "lm_head")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def _gated(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gated = F.silu(self._linear(x, f"{name}.gate_proj")) * self._linear(x, f"{name}.up_proj")
        return self._linear(gated, f"{name}.down_proj")

    def _experts(self, x: torch.Tensor, name: str) -> torch.Tensor:
        config, groups = self.config, self.config["n_group"]
        score = F.linear(x.float(), self.weights[f"{name}.gate.weight"].float()).sigmoid()
        ranked = score + self.weights[f"{name}.gate.expert_bias"].float()
        grouped = ranked.unflatten(1, (groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(config["topk_group"], -1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
        experts = (
            grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(config["num_experts_per_tok"]).indices
        )
        weights = score.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in experts.unique().tolist():
            rows, places = torch.where(experts == expert)
            made = self._gated(x[rows], f"{name}.experts.{expert}")
            out.index_add_(0, rows, made.float() * weights[rows, places, None])
        return out.to(x.dtype) + self._gated(x, f"{name}.shared_experts")


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [H, T, D]: its first channels, halves paired"""
    first, second, rest = x.split([cos.shape[1], cos.shape[1], x.shape[2] - 2 * cos.shape[1]], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


LOOPS = {"SDARForCausalLM": Sdar, "LLaDA2MoeModelLM": LLaDA2}


def load(folder: Path, dtype: torch.dtype):
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    return LOOPS[architecture](folder, dtype)


def main() -> None:
    """Job: checkpoint, dtype, threads, prompt, new, block, steps, repetitions."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    model = load(Path(job["checkpoint"]), getattr(torch, job["dtype"]))
    asked = job["prompt"], job["new"], job["block"], job["steps"]
    answer = model.generate(*asked)  # warms allocators and oneDNN's products
    for _ in range(job["repetitions"]):
        begin = time.perf_counter()
        again = model.generate(*asked)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
        assert again == answer
    print(json.dumps({"answer": answer}))


if __name__ == "__main__":
    main()
