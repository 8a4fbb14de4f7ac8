"""Tokens per second of models that know blocks, beside their published loops (benchmarks/block_loop.py), on random
checkpoints of LLaDA2.0-mini's and SDAR's proportions in CPU size. And what a prompt costs that others have begun with.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks import drawing, report
from benchmarks.checkpoints import CACHE
from benchmarks.timed_engine import engine_environment, loop_environment

PROMPT, NEW, SHARED = 480, 64, 1024
TITLE = "Speed of models that know blocks"
COLUMNS = [
    report.Column("shape", "checkpoint"),
    report.Column("method", "method"),
    report.Column("requests", "requests"),
    report.Column("tokens_per_s", "tokens/s", "{:.1f}"),
    report.Column("vs_loop", "× loop", "{:.2f}"),
    report.Column("same", "the loop's tokens"),
    report.Column("seconds", "seconds", lambda seconds: f"{statistics.median(seconds):.2f}"),
    report.Column("cached", "prompt tokens cached"),
    report.Column("others", "cores of others", "{:.2f}"),
]
NOTES = [
    "loop: the published loop, one request. LLaDA2.0's recomputes everything up to the end of the block in each step; "
    "SDAR's keeps keys and values of finished blocks and makes a forward more for each. Both fill one token a step: "
    "random weights are sure of none.",
    f"tokens/s: response tokens delivered over the wall time from submission to the last of them, medians of "
    "the repetitions after one that warms up. Several requests have ragged prompts from half to one and a half times "
    f"{PROMPT} tokens; their ratio is to the loop's one.",
    f"prompt of {SHARED}: seconds until one block of answer is there, for a prompt that nobody has asked with and for "
    "one whose keys and values are cached (vLLM's prefix caching).",
]


@dataclass(frozen=True)
class Sdar:
    """SDAR-8B is 36 layers of 4096, 32 heads and 8 of keys, feed-forward 12288."""

    name: str = "sdar"
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 3
    feed_forward: int = 2304
    vocabulary: int = 8960
    block: int = 4
    steps: int = 4  # of a block

    def config(self) -> dict:
        return {
            "architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": self.width, "head_dim": 64,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.feed_forward, "vocab_size": self.vocabulary, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False,
            "tie_word_embeddings": False, "block_size": self.block, "mask_token_id": self.vocabulary - 1,
            "eos_token_id": self.vocabulary - 2, "torch_dtype": "float32",
        }  # fmt: skip

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width, inner = self.width, self.feed_forward
        yield "model.embed_tokens.weight", (self.vocabulary, width)
        for layer in range(self.layers):
            own = f"model.layers.{layer}"
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                yield f"{own}.self_attn.{name}_proj.weight", (heads * 64, width)
            yield f"{own}.self_attn.o_proj.weight", (width, self.heads * 64)
            yield f"{own}.self_attn.q_norm.weight", (64,)
            yield f"{own}.self_attn.k_norm.weight", (64,)
            yield f"{own}.mlp.gate_proj.weight", (inner, width)
            yield f"{own}.mlp.up_proj.weight", (inner, width)
            yield f"{own}.mlp.down_proj.weight", (width, inner)
            yield f"{own}.input_layernorm.weight", (width,)
            yield f"{own}.post_attention_layernorm.weight", (width,)
        yield "model.norm.weight", (width,)
        yield "lm_head.weight", (self.vocabulary, width)


@dataclass(frozen=True)
class LLaDA2:
    """LLaDA2.0-mini is 20 layers of 2048, 16 heads and 4 of keys, 256 experts of 512 of which 8 are used."""

    name: str = "llada2-mini"
    layers: int = 10
    width: int = 512
    heads: int = 8
    kv_heads: int = 2
    feed_forward: int = 1280
    experts: int = 64
    used: int = 8
    expert: int = 128
    vocabulary: int = 8960
    block: int = 32
    steps: int = 32

    def config(self) -> dict:
        return {
            "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_size": self.width,
            "head_dim": 64, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "intermediate_size": self.feed_forward,
            "moe_intermediate_size": self.expert, "num_experts": self.experts, "num_experts_per_tok": self.used,
            "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
            "norm_topk_prob": True, "score_function": "sigmoid", "router_dtype": "fp32", "first_k_dense_replace": 1,
            "moe_router_enable_expert_bias": True, "use_qk_norm": True, "use_bias": False, "use_qkv_bias": False,
            "vocab_size": self.vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 6e5,
            "partial_rotary_factor": 0.5, "hidden_act": "silu", "tie_word_embeddings": False,
            "mask_token_id": self.vocabulary - 1, "pad_token_id": self.vocabulary - 2, "torch_dtype": "float32",
        }  # fmt: skip

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        width = self.width

        def gated(name: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield f"{name}.gate_proj.weight", (inner, width)
            yield f"{name}.up_proj.weight", (inner, width)
            yield f"{name}.down_proj.weight", (width, inner)

        yield "model.word_embeddings.weight", (self.vocabulary, width)
        for layer in range(self.layers):
            own = f"model.layers.{layer}"
            yield f"{own}.attention.query_key_value.weight", ((self.heads + 2 * self.kv_heads) * 64, width)
            yield f"{own}.attention.dense.weight", (width, self.heads * 64)
            for name, size in (
                ("attention.query_layernorm", 64), ("attention.key_layernorm", 64), ("input_layernorm", width),
                ("post_attention_layernorm", width),
            ):  # fmt: skip
                yield f"{own}.{name}.weight", (size,)
            if layer == 0:
                yield from gated(f"{own}.mlp", self.feed_forward)
                continue
            yield f"{own}.mlp.gate.weight", (self.experts, width)
            yield f"{own}.mlp.gate.expert_bias", (self.experts,)
            yield from gated(f"{own}.mlp.shared_experts", self.expert)
            for expert in range(self.experts):
                yield from gated(f"{own}.mlp.experts.{expert}", self.expert)
        yield "model.norm.weight", (width,)
        yield "lm_head.weight", (self.vocabulary, width)


Shape = Sdar | LLaDA2
SHAPES: tuple[Shape, ...] = (LLaDA2(), Sdar())
TOYS: tuple[Shape, ...] = (
    LLaDA2(layers=2, width=64, heads=2, kv_heads=1, feed_forward=96, experts=16, expert=32, vocabulary=512),
    Sdar(layers=2, width=64, heads=2, kv_heads=1, feed_forward=96, vocabulary=512),
)


def checkpoint(shape: Shape) -> Path:
    """In the hub's form, written if it is not there yet"""
    folder = CACHE / f"{shape.name}-{shape.layers}x{shape.width}-float32"
    done = folder / "config.json"
    if not done.exists() or json.loads(done.read_text()) != shape.config():
        folder.mkdir(parents=True, exist_ok=True)
        draw = torch.Generator().manual_seed(0)
        weights = {
            name: torch.zeros(size) if name.endswith("expert_bias")
            else torch.ones(size) if len(size) == 1
            else torch.empty(size).normal_(0, 0.05, generator=draw)
            for name, size in shape.shapes()
        }  # fmt: skip
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        done.write_text(json.dumps(shape.config(), indent=1))  # last: it marks the folder as complete
    return folder


def prompts(shape: Shape, count: int, length: int = PROMPT) -> list[list[int]]:
    """Ragged around the length, which is their mean"""
    draw = torch.Generator().manual_seed(length)
    shares = [0.5 + index / (count - 1) for index in range(count)] if count > 1 else [1.0]
    return [
        torch.randint(0, shape.vocabulary - 2, (round(length * share),), generator=draw).tolist() for share in shares
    ]


def loop(shape: Shape, threads: int, repetitions: int) -> tuple[dict, list[int]]:
    """-> row, answer; in a process of its own"""
    job = {
        "checkpoint": str(checkpoint(shape)), "dtype": "float32", "threads": threads, "new": NEW,
        "prompt": prompts(shape, 1)[0], "block": shape.block, "steps": shape.steps, "repetitions": repetitions,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.block_loop"], input=json.dumps(job), stdout=subprocess.PIPE, text=True,
        check=True, env=os.environ | loop_environment(threads),
    )  # fmt: skip
    *timed, last = map(json.loads, done.stdout.splitlines())
    seconds = [line["seconds"] for line in timed]
    row = {"shape": shape.name, "method": "loop", "requests": 1, "seconds": seconds}
    return row | {"tokens_per_s": NEW / statistics.median(seconds)}, last["answer"]


class Engine:
    def __init__(self, shape: Shape, threads: int):
        os.environ.update(engine_environment(threads))
        from vllm import LLM

        self.shape = shape
        self.llm = LLM(
            str(checkpoint(shape)), dtype="float32", max_model_len=2048, max_num_seqs=8, max_num_batched_tokens=8192,
            kv_cache_memory_bytes=1 << 30, skip_tokenizer_init=True, disable_log_stats=True, use_tqdm_on_load=False,
            enable_prefix_caching=True,
        )  # fmt: skip

    def run(self, wanted: list[list[int]], new: int) -> tuple[float, list]:
        from vllm import SamplingParams

        options = {"dlm_block_length": self.shape.block, "dlm_steps": self.shape.steps, "dlm_threshold": "none"}
        params = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
            extra_args=options | {"dlm_algorithm": "low_confidence_dynamic"},
        )  # fmt: skip
        begin = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in wanted], params, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    def requests(self, count: int, repetitions: int) -> tuple[dict, list[int]]:
        """-> row, the first answer; nothing is left cached between repetitions"""
        seconds, answer = [], []
        for repetition in range(repetitions + 1):
            self.llm.reset_prefix_cache()
            taken, outputs = self.run(prompts(self.shape, count), NEW)
            seconds += [taken] if repetition else []
            answer = list(outputs[0].outputs[0].token_ids)
        row = {"shape": self.shape.name, "method": "engine", "requests": count, "seconds": seconds}
        return row | {"tokens_per_s": count * NEW / statistics.median(seconds)}, answer

    def shared_prompts(self, repetitions: int) -> Iterator[dict]:
        """A block of answer to a long prompt, and to another one that begins with it"""
        (begin,) = prompts(self.shape, 1, SHARED)
        taken: dict[str, list[float]] = {"new": [], "cached": []}
        cached = {"new": 0, "cached": 0}
        for repetition in range(repetitions + 1):
            self.llm.reset_prefix_cache()
            for kind, end in (("new", [7] * 16), ("cached", [9 + repetition] * 16)):
                seconds, (output,) = self.run([begin + end], self.shape.block)
                taken[kind] += [seconds] if repetition else []
                cached[kind] = output.num_cached_tokens or 0
        for kind, seconds in taken.items():
            method = f"prompt of {SHARED}, {kind}"
            yield {
                "shape": self.shape.name, "method": method, "requests": 1, "seconds": seconds, "cached": cached[kind],
                "tokens_per_s": self.shape.block / statistics.median(seconds),
            }  # fmt: skip

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def measured(shape: Shape, threads: int, repetitions: int) -> Iterator[dict]:
    base, wanted = loop(shape, threads, repetitions)
    yield base
    engine = Engine(shape, threads)
    for count in (1, 8):
        row, answer = engine.requests(count, repetitions)
        yield row | {
            "vs_loop": row["tokens_per_s"] / base["tokens_per_s"],
            "same": f"{sum(map(int.__eq__, answer, wanted))} of {NEW}" if count == 1 else None,
        }
    yield from engine.shared_prompts(repetitions)
    engine.close()


def settings(shapes: tuple[Shape, ...]) -> dict:
    return {
        "shapes": {shape.name: asdict(shape) for shape in shapes},
        "weights": "random, normal(0, 0.05), seed 0",
        "dtype": "float32",
        "decoding": f"one token a step, {NEW} new ones to prompts of {PROMPT}",
        "baseline": "the published loop of each family, one request (loop)",
        "counted": "response tokens delivered",
    }


def plot(figure, rows: list[dict]) -> None:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if "vs_loop" in row:
            count = row["requests"]
            groups[f"{row['shape']}\n{count} request{'s' * (count > 1)}"] = {"engine": row["vs_loop"]}
    drawing.bars(figure.subplots(), groups, "tokens/s, times those of the published loop")
