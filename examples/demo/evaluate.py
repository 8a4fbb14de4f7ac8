"""Grade the demo checkpoint: `python -m examples.demo.evaluate`.

Every line of the table is exact match of the delivered answer over fresh prompts, whose names,
codes and filler come from seeds that training never used. Finished lines are kept in the JSON
file, so an interrupted grading goes on where it stopped (for the same weights and settings).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing as mp
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import tokenizer as tok
from .decoding import answers
from .model import load_checkpoint
from .tasks import DEPTHS, SMALL_TASKS, Filler, Sample, recall
from .train import ROOT

EVALUATION_SEED = 1_000_003
REFRESH_WORDS = {"step": "in every step", "block": "once per block", "never": "never"}
STALE, BLOCK_32 = ", stale prompt", ", block 32"


@dataclass(frozen=True)
class Line:
    name: str
    draw: Callable[[np.random.Generator, Filler], Sample]
    canvas: int
    bar: float | None = None  # exact match to reach; None where a line is only reported
    ceiling: float | None = None  # for lines that must fail
    block_length: int = 8
    refresh: str = "step"  # when the prompt's K/V are recomputed: each step, each block, never
    share: float = 1.0  # of the number of prompts asked for

    def prompts(self, full: int) -> int:
        return max(1, round(full * self.share))


def _recall(
    name: str,
    length: int,
    canvas: int = 16,
    bar: float | None = None,
    share: float = 1.0,
    refresh: str = "step",
    ceiling: float | None = None,
    **options,
) -> Line:
    return Line(
        name,
        lambda rng, filler: recall(rng, filler, length, **options),
        canvas,
        bar,
        ceiling,
        refresh=refresh,
        share=share,
    )


def _small(task: str, bar: float | None, block_length: int = 8, refresh: str = "step") -> Line:
    note = BLOCK_32 * (block_length == 32) + STALE * (refresh == "never")
    return Line(task + note, lambda rng, _: SMALL_TASKS[task](rng), 32, bar, block_length=block_length, refresh=refresh)


def lines() -> list[Line]:
    bars = {"copy": 0.98, "reverse": 0.98, "sort": 0.9, "add": 0.9, "totals": 0.9, "follow": None}
    table = [_small(task, bar) for task, bar in bars.items()]
    table += [
        _recall("512 tokens, 1 needle", 512, bar=0.98),
        _recall("1024 tokens, 1 needle", 1024, bar=0.95),
        *[_recall(f"1024 tokens, 1 needle at depth {depth:g}", 1024, bar=0.95, depth=depth) for depth in DEPTHS],
        _recall("512 tokens, needle removed", 512, ceiling=0.01, omit=True),
        _recall("512 tokens, needle removed, 7 others left", 512, ceiling=0.01, share=0.25, needles=8, omit=True),
        *[
            _recall(f"512 tokens, 8 needles, {q} queried", 512, 8 * q + 8, 0.95, 0.5, needles=8, queried=q)
            for q in (2, 3, 4)
        ],
        _recall("512 tokens, 16 needles", 512, bar=0.95, share=0.5, needles=16),
        _recall("1024 tokens, 16 needles", 1024, bar=0.95, share=0.5, needles=16),
        _recall("1024 tokens, 16 needles, 4 queried", 1024, 40, None, 0.125, needles=16, queried=4),
        _recall("64 tokens, 1 needle", 64, share=0.25),
        _recall("128 tokens, 4 needles", 128, needles=4, share=0.25),
        _recall("256 tokens, 8 needles", 256, needles=8, share=0.25),
        _recall("2048 tokens, 1 needle", 2048, share=0.125),
        _recall("512 tokens, 8 needles", 512, needles=8, share=0.25),
        _recall("512 tokens, 8 needles" + STALE, 512, needles=8, refresh="never", share=0.25),
    ]
    table += [_small(task, None, block_length=32) for task in bars]
    return table + [_small(task, None, refresh="never") for task in bars]


@dataclass
class Result:
    name: str
    n: int
    right: int
    bar: float | None
    ceiling: float | None
    canvas: int
    block_length: int
    refresh: str
    seconds: float
    digit_accuracy: float | None = None  # share of code digits right, for lines that must fail
    misses: list[str] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def met(self) -> bool | None:
        if self.ceiling is not None:
            return self.accuracy <= self.ceiling
        return None if self.bar is None else self.accuracy >= self.bar

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        z, p, n = 1.96, self.accuracy, self.n
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def grade(model, line: Line, prompts: int) -> Result:
    # Variants of decoding meet the same prompts as the line they vary.
    prompts_name = line.name.removesuffix(STALE).removesuffix(BLOCK_32)
    seed = int.from_bytes(hashlib.sha256(prompts_name.encode()).digest()[:4], "little")
    rng = np.random.default_rng([EVALUATION_SEED, seed])
    filler = Filler(EVALUATION_SEED, sentences=5_000)
    samples = [line.draw(rng, filler) for _ in range(line.prompts(prompts))]
    began = time.perf_counter()
    found = answers(model, samples, line.canvas, line.block_length, line.refresh)
    right = [answer == sample.answer_ids for answer, sample in zip(found, samples, strict=False)]
    result = Result(
        line.name,
        len(samples),
        sum(right),
        line.bar,
        line.ceiling,
        line.canvas,
        line.block_length,
        line.refresh,
        round(time.perf_counter() - began, 1),
    )
    wrong = [(tok.decode(s.answer_ids), tok.decode(a)) for s, a, r in zip(samples, found, right, strict=False) if not r]
    result.misses = [f"wanted{wanted!r} got{got!r}" for wanted, got in wrong[:5]]
    if line.ceiling is not None:
        result.digit_accuracy = round(_digit_accuracy(samples, found), 3)
    return result


def _digit_accuracy(samples, found) -> float:
    pairs = [
        (w, g)
        for s, a in zip(samples, found, strict=False)
        for w, g in zip(s.answer_ids, a + [tok.MASK] * len(s.answer_ids), strict=False)
        if w in tok.DIGIT_IDS
    ]
    return sum(w == g for w, g in pairs) / len(pairs)


def markdown(results: list[Result], conditions: dict) -> str:
    text = ["# Demo checkpoint: exact match", ""]
    text += [f"* {name}: {value}" for name, value in conditions.items()]
    text += ["", "| prompts | n | exact | 95 % interval | bar | met |", "|---|---|---|---|---|---|"]
    for r in results:
        low, high = r.interval()
        bar = "" if r.bar is None else f"{r.bar:g}"
        bar = bar if r.ceiling is None else f"<= {r.ceiling:g}"
        note = f" (digits {r.digit_accuracy:.3f})" if r.digit_accuracy is not None else ""
        met = {True: "yes", False: "**no**", None: ""}[r.met]
        text.append(f"| {r.name} | {r.n} | {r.accuracy:.4f}{note} | {low:.3f}-{high:.3f} | {bar} | {met} |")
    return "\n".join(text) + "\n"


class _Worker:
    """One process of one thread: two of them grade faster than two threads on one line."""

    model = None
    prompts = 0
    refresh = "step"

    @classmethod
    def start(cls, checkpoint: Path, dtype: str, prompts: int, refresh: str) -> None:
        torch.set_num_threads(1)
        cls.model, cls.prompts = load_checkpoint(checkpoint, getattr(torch, dtype)), prompts
        cls.refresh = refresh

    @classmethod
    def grade(cls, name: str) -> Result:
        line = next(line for line in lines() if line.name == name)
        if line.refresh == "step":
            line = replace(line, refresh=cls.refresh)
        return grade(cls.model, line, cls.prompts)


def _report(path: Path, results: list[Result], conditions: dict) -> None:
    order = {line.name: place for place, line in enumerate(lines())}
    results.sort(key=lambda result: order.get(result.name, len(order)))
    text = json.dumps({"conditions": conditions, "results": [asdict(r) for r in results]}, indent=1)
    path.write_text(text + "\n")
    path.with_suffix(".md").write_text(markdown(results, conditions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "vllm_dlm/demo/checkpoint")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/demo.json")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--only", default="", help="grade only lines whose name contains this")
    parser.add_argument(
        "--refresh",
        choices=["step", "block", "never"],
        default="step",
        help="when the prompt's K/V are recomputed, unless the line says so",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--fresh", action="store_true", help="ignore lines already graded")
    options = parser.parse_args()

    weights = (options.checkpoint / "model.safetensors").read_bytes()
    conditions = {
        "weights sha256": hashlib.sha256(weights).hexdigest()[:16],
        "compute dtype": options.dtype,
        "decoding": "low-confidence, blocks of 8 unless named, 1 token per step",
        "prompt recomputed": REFRESH_WORDS[options.refresh] + " (stale prompt: never)",
        "counted as right": "the delivered tokens, end of turn included, equal the answer",
        "prompts per full line": options.prompts,
    }
    results: list[Result] = []
    if options.output.exists() and not options.fresh:
        old = json.loads(options.output.read_text())
        if old["conditions"] == conditions:
            results = [Result(**entry) for entry in old["results"]]
    graded = {result.name for result in results}
    wanted = [line for line in lines() if options.only in line.name and line.name not in graded]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = (options.checkpoint, options.dtype, options.prompts, options.refresh)
    pool = mp.get_context("spawn").Pool(options.workers, _Worker.start, settings)
    prompts = sum(line.prompts(options.prompts) for line in wanted)
    with pool, tqdm(total=prompts, unit="prompt") as bar:
        for result in pool.imap_unordered(_Worker.grade, [line.name for line in wanted]):
            results.append(result)
            bar.update(result.n)
            below = "  BELOW THE BAR" if result.met is False else ""
            bar.write(f"{result.accuracy:.4f} of {result.n:4d}  {result.name}  ({result.seconds:.0f} s){below}")
            _report(options.output, results, conditions)


if __name__ == "__main__":
    main()
