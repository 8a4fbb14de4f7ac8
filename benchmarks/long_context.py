"""Engines of random decoders at long context, caches filled without reading a prompt, and one decoding timed."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.checkpoints import CACHE


@dataclass(frozen=True)
class Shape:
    """Proportions of a known model, with a small vocabulary."""

    name: str
    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int = 8192

    def config(self, context: int):
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.family, hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, intermediate_size=self.feed_forward,
            vocab_size=self.vocabulary, max_position_embeddings=context, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=self.vocabulary - 1,
        )  # fmt: skip

    @property
    def weights(self) -> int:
        """Bytes of a step's weights in bfloat16."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (self.layers * (attention + 3 * self.width * self.feed_forward) + self.width * self.vocabulary)

    def kv_bytes(self, context: int) -> int:
        return self.layers * context * self.kv_heads * self.head_dim * 4

    def describe(self, context: int) -> dict:
        return asdict(self) | {
            "weight_mib": self.weights >> 20,
            "kv_mib_per_request": self.kv_bytes(context) >> 20,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2-0.5b", "qwen2", 896, 24, 14, 2, 64, 4864),
        Shape("qwen1.5-0.5b", "qwen2", 1024, 24, 16, 16, 64, 2816),
        Shape("qwen3-0.6b", "qwen3", 1024, 28, 16, 8, 128, 3072),
        Shape("smoke", "qwen2", 128, 4, 4, 2, 32, 192, 512),
    )
}


def checkpoint(shape: Shape, context: int, dtype: str = "bfloat16") -> Path:
    """Folder of a random checkpoint; written if it is not there yet."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = CACHE / f"{shape.name}-{context}-{dtype}"
    done = folder / "shape.json"
    if not done.exists() or json.loads(done.read_text()) != asdict(shape):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape.config(context), torch_dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        done.write_text(json.dumps(asdict(shape)))
    return folder


def start(folder: Path, selection: dict | None, context: int, args, **settings):
    from vllm import LLM

    if selection is not None:
        settings["additional_config"] = {"dlm": {"selection": selection}}
    return LLM(
        str(folder), max_model_len=context, max_num_seqs=max(args.batches), skip_tokenizer_init=True,
        enforce_eager=args.eager, disable_log_stats=True, use_tqdm_on_load=False, **settings,
    )  # fmt: skip


def page_counts(llm) -> dict:
    (counts,) = llm.collective_rpc("dlm_page_counts")
    return counts


def close(llm) -> None:
    llm.llm_engine.engine_core.shutdown()


def skip_prompts(worker) -> None:
    """Long chunks do not go through the model; short ends of prompts, and decoding, do."""
    import torch

    model = worker.model_runner.model
    forward, width = model.forward, worker.model_config.get_hidden_size()

    def without_prompts(*rest, positions, **more):
        if (count := positions.shape[-1]) > 256:
            return torch.zeros(count, width, dtype=worker.model_config.dtype)
        return forward(*rest, positions=positions, **more)

    model.forward = without_prompts


def fill_cache(worker) -> None:
    """Random keys and values in every page, and summaries of them."""
    import torch

    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        pages = layer.kv_cache
        piece = torch.randn(8, *pages.shape[1:]).to(pages.dtype)
        for start in range(0, len(pages), len(piece)):
            pages[start : start + len(piece)] = piece[: len(pages) - start].roll(start, 1)
        if (summaries := getattr(layer.impl, "summaries", None)) is not None:
            for ids in torch.arange(len(summaries.first)).split(256):
                layer.impl.describe(pages, ids)


def decode(llm, prompt: list[int], batch: int, new: int) -> tuple[float, list[list[int]]]:
    """Seconds per decoding step, and the tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    engine = llm.llm_engine
    tokens = {f"{time.monotonic_ns()}-{i}": [] for i in range(batch)}
    for name in tokens:
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    begin, done = None, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] += output.outputs[0].token_ids
        if begin is None and all(tokens.values()):
            begin, done = time.perf_counter(), min(map(len, tokens.values()))
    return (time.perf_counter() - begin) / max(1, new - done), list(tokens.values())
