"""Tokens per second of block-causal models against their published loops (benchmarks/lib/loops.py), on random weights
of LLaDA2.0-mini's and SDAR's proportions in CPU size; and what prompts cost that are in the prefix cache.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.lib import plots
from benchmarks.lib.models import SHAPES
from benchmarks.lib.process import loop_environment
from benchmarks.lib.report import Column, columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import ragged, requests_text

PROMPT, NEW, SHARED = 480, 64, 1024
COLUMNS = columns(
    """
    shape | checkpoint
    method | method
    requests | requests
    tokens_per_s | tokens/s | {:.1f}
    vs_loop | × loop | {:.2f}
    same | the loop's tokens
    cached | prompt tokens cached
    rows | prompt rows computed
    others | cores of others | {:.2f}
    failed | failed
    """
)
COLUMNS.insert(6, Column("seconds", "seconds", lambda seconds: f"{statistics.median(seconds):.2f}"))
NOTES = [
    "loop: the published loop, one request. LLaDA2.0's recomputes everything up to the end of the block in each step; "
    "SDAR's keeps keys and values of finished blocks and adds a forward for each. Both fill one token per step: random "
    "weights are never sure of a token.",
    "tokens/s: response tokens delivered over the wall time from submission to the last of them, medians of the "
    "repetitions after a warm-up. Several requests have ragged prompts from half to one and a half times "
    f"{PROMPT} tokens; their ratio is to the loop's one.",
    f"prompt of {SHARED}: seconds until one block of answer is there, for a prompt that is new, and for one whose keys "
    "and values are cached (vLLM's prefix caching).",
]
SETTINGS = {
    "weights": "random, normal(0, 0.05), seed 0",
    "dtype": "float32",
    "decoding": f"one token a step, {NEW} new ones to prompts of {PROMPT}",
    "baseline": "the published loop of each family, one request (loop)",
    "counted": "response tokens delivered",
}


@dataclass(frozen=True)
class Case:
    shape: str
    method: str  # "loop", "engine", "new" or "cached"
    requests: int = 1
    repetitions: int = 3


def names(toy: bool) -> list[str]:
    return ["toy-llada2", "toy-sdar"] if toy else ["llada2-mini", "sdar-proportions"]


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    shapes = {name: SHAPES[name].describe() for name in names(bool(options and options.toy))}
    title = "Speed of block-causal models"
    return {"speed-blocks": Table(title, COLUMNS, NOTES, {"shapes": shapes} | SETTINGS, finished, plot=plot)}


def parts(options: argparse.Namespace) -> list[Part]:
    if options.device != "cpu":
        raise SystemExit("blocks: the published loops run on a CPU; `speed --device cuda` has SDAR-8B's shape")
    made, repetitions = [], 1 if options.toy else 3
    for shape in names(options.toy):

        def cells(*cases: tuple[str, int], shape=shape) -> tuple[Cell, ...]:
            return tuple(
                Cell(f"{shape} {method} x{count}", 0.5 if options.toy else 3.0, Case(shape, method, count, repetitions))
                for method, count in cases
            )

        environment = tuple(loop_environment(options.threads).items())
        loop = cells(("loop", 1))
        made.append(Part("blocks", "speed-blocks", f"{shape}, loop", loop, vllm=False, environment=environment))
        own = cells(("engine", 1), ("engine", 8), ("new", 1), ("cached", 1))
        made.append(Part("blocks", "speed-blocks", f"{shape}, engine", own))
    return made


def opened(part: Part, options: argparse.Namespace):
    from benchmarks.lib import engines, internals, loops

    shape = SHAPES[part.cells[0].work.shape]
    folder = shape.checkpoint("float32")
    request = shape.one_token_per_step(NEW)
    vocabulary, steps = shape.model.vocabulary, request["dlm_steps"]
    if part.cells[0].work.method == "loop":
        loop = loops.load(folder, torch.float32)

        def measure_loop(case: Case) -> dict:
            (prompt,) = engines.random_prompts(vocabulary, [PROMPT], PROMPT)
            text = loop.generate(prompt, NEW, shape.block, steps)  # warms allocators and oneDNN's products
            what = (loop, prompt, NEW, shape.block, steps)
            return row_of(case, [loops.seconds_of(*what) for _ in range(case.repetitions)], NEW) | {"text": text}

        return measure_loop

    sizes = {"max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 8192, "enable_prefix_caching": True}
    llm = engines.start(folder, cpu_bytes=1 << 30, dtype="float32", **sizes)

    def timed(prompts: list[list[int]], new: int) -> tuple[float, list]:
        params = engines.sampling(new, request, ignore_eos=True)
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - begin, outputs

    def measure(case: Case) -> dict:
        return prompt_of(case) if case.method in ("new", "cached") else response_of(case)

    def response_of(case: Case) -> dict:
        """Nothing is left in the prefix cache between repetitions."""
        prompts, seconds = engines.random_prompts(vocabulary, ragged(PROMPT, case.requests), PROMPT), []
        outputs: list = []
        for _ in range(case.repetitions + 1):
            llm.reset_prefix_cache()
            taken, outputs = timed(prompts, NEW)
            seconds.append(taken)
        return row_of(case, seconds[1:], case.requests * NEW) | {"text": list(outputs[0].outputs[0].token_ids)}

    def prompt_of(case: Case) -> dict:
        """A block of answer to a long prompt, and to another one with the same beginning"""
        (begin,), seconds, found = engines.random_prompts(vocabulary, [SHARED], SHARED), [], {}
        for repetition in range(case.repetitions + 1):
            llm.reset_prefix_cache()
            if case.method == "cached":
                timed([begin + [7] * 16], shape.block)
            before = internals.rows_read(llm)
            taken, (output,) = timed([begin + [9 + repetition] * 16], shape.block)
            seconds.append(taken)
            found = {"cached": output.num_cached_tokens or 0, "rows": internals.rows_read(llm) - before}
        row = row_of(case, seconds[1:], shape.block)
        return row | {"method": f"prompt of {SHARED}, {case.method}"} | found

    return measure


def row_of(case: Case, seconds: list[float], tokens: int) -> dict:
    row = {"shape": case.shape, "method": case.method, "requests": case.requests, "seconds": seconds}
    return row | {"tokens_per_s": tokens / statistics.median(seconds)}


def finished(rows: list[dict]) -> list[dict]:
    loops = {row["shape"]: row for row in rows if row.get("method") == "loop"}
    for row in rows:
        if row.get("method") == "engine" and (base := loops.get(row["shape"])):
            row["vs_loop"] = row["tokens_per_s"] / base["tokens_per_s"]
            if row["requests"] == 1 and "text" in row:
                row["same"] = f"{sum(map(int.__eq__, row['text'], base['text']))} of {NEW}"
    return rows


def plot(figure, rows: list[dict]) -> None:
    groups = {
        f"{row['shape']}\n{requests_text(row['requests'])}": {"engine": row["vs_loop"]}
        for row in rows
        if "vs_loop" in row
    }
    if groups:
        plots.bars(figure.subplots(), groups, "tokens/s, times those of the published loop")
