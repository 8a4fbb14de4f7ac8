"""What the policies cost on the real models' shapes, from their plans and the cost model: no weights needed.

The cost model is checked against counted rows and query-key pairs in tests/engine/test_reuse.py. One token per step;
multiply-adds of linears, attention and head.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from benchmarks.lib.models import ARCHITECTURES, SHAPES
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table
from vllm_dlm.families import FAMILIES
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan
from vllm_dlm.plugins.reuse.delayed import Delayed
from vllm_dlm.plugins.reuse.dllm_cache import DLLMCache
from vllm_dlm.plugins.reuse.dyllm import DyLLM
from vllm_dlm.plugins.reuse.fast_dllm import FastDLLM
from vllm_dlm.plugins.reuse.none import Dense
from vllm_dlm.step.counts import Counts, ModelShape

NAMES = {"LLaDA-8B": "llada-8b", "Dream-7B": "dream-7b", "RND1-30B-A3B": "rnd1-30b-a3b"}
MASK = -1


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    prompt: int
    new: int
    block: int
    reuse: Reuse
    published: str = ""

    @property
    def shape(self) -> ModelShape:
        return SHAPES[NAMES[self.model]].model

    @property
    def family(self) -> str:
        return SHAPES[NAMES[self.model]].family


LONG = DLLMCache(prompt_interval=100, response_interval=8)
CASES = [
    Case("LongBench-HotpotQA", "LLaDA-8B", 4096, 32, 32, LONG, "9.1x FLOPs (dLLM-Cache)"),
    Case("LongBench-HotpotQA, 12k", "LLaDA-8B", 12000, 32, 32, LONG, "9.1x FLOPs (dLLM-Cache)"),
    Case("GSM8K 4-shot", "LLaDA-8B", 893, 256, 8, DLLMCache()),
    Case("GSM8K 4-shot", "LLaDA-8B", 893, 256, 8, DyLLM(), "7.0x tokens/s (DyLLM)"),
    Case("GSM8K 4-shot", "LLaDA-8B", 893, 256, 32, FastDLLM()),
    Case("GSM8K 4-shot, d3LLM", "LLaDA-8B", 893, 256, 256, Delayed()),
    Case("GSM8K 8-shot", "Dream-7B", 893, 256, 256, DLLMCache(prompt_interval=25, response_interval=2)),
    Case("GSM8K 4-shot", "RND1-30B-A3B", 893, 256, 32, FastDLLM()),
]
COLUMNS = columns(
    """
    name | setting
    shape | model
    prompt | prompt
    new | new
    policy | policy
    vs_none | none / policy | {:.1f}x
    vs_reference | reference loop / policy | {:.1f}x
    published | published
    """
)
NOTES = [
    "none: this engine's exact policy (head and last layer on the rows that are read). reference loop: every row "
    "through every layer and the head, as in the published code.",
    "Threshold policies (dyllm) are counted at their most: every live row recomputed.",
    "dLLM-Cache's 9.1x: its published code runs all rows of the prompt through the first layer and the head in every "
    "step, which is 8 to 9% of a full step. Counted like that, the two HotpotQA rows are 8.3x and 9.3x. The engine "
    "drops these rows, which no later layer reads, so that almost all that is left is the first of 32 steps.",
    "DyLLM's 7.0x is a ratio of tokens per second, and its threshold leaves most rows out. The table counts "
    "every live row as recomputed, so 3.4x is the least.",
]


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    settings = {
        "shapes": {name: vars(SHAPES[own].model) for name, own in NAMES.items()},
        "dtype": "any",
        "baseline": "this engine's exact policy (none) and the published loop (reference loop)",
        "counted": "multiply-adds of linears, attention and head, by formula, one token per step",
    }
    title = "Multiply-adds of published settings, by the cost model"
    return {"costs": Table(title, COLUMNS, NOTES, settings, timed=False)}


def parts(options: argparse.Namespace) -> list[Part]:
    cells = [Cell(f"{case.name}, {case.model}, {label(case.reuse)}, {case.prompt}", 0.05, case) for case in CASES]
    return [Part("costs", "costs", "published settings", tuple(cells), vllm=False)]


def opened(part: Part, options: argparse.Namespace):
    return row


def row(case: Case) -> dict:
    policy, none = macs(case, case.reuse), macs(case, Dense())
    reference = SHAPES[NAMES[case.model]].dense_flops(case.prompt + case.new, case.new) // 2
    found = {"name": case.name, "shape": case.model, "prompt": case.prompt, "new": case.new}
    found |= {"policy": label(case.reuse), "vs_none": none / policy, "vs_reference": reference / policy}
    return found | {"published": case.published}


def label(reuse: Reuse) -> str:
    """Its name, and the fields that are not at their defaults"""
    default = type(reuse)()
    changed = [f"{name}={value}" for name, value in vars(reuse).items() if value != getattr(default, name)]
    return " ".join([reuse.name, *changed])


def macs(case: Case, reuse: Reuse) -> int:
    """Multiply-accumulate operations of a whole response at one token per step"""
    length, total, shift = case.prompt + case.new, 0, FAMILIES[ARCHITECTURES[case.family][0]].logits_shift
    nothing = np.zeros(0, np.int64)
    tokens, filled_at = np.zeros(length, np.int64), np.zeros(length, np.int64)
    tokens[case.prompt :] = MASK
    state = {"mask_id": MASK, "tokens": tokens, "filled_at": filled_at, "confidence": nothing, "changed": nothing}
    for step in range(case.new):
        if step:  # from left to right
            tokens[case.prompt + step - 1], filled_at[case.prompt + step - 1] = 0, step
        start = case.prompt + step // case.block * case.block
        block = start, min(start + case.block, length)
        at = Progress(case.prompt, length, block, step % case.block, step, step == 0, shift, **state)
        plan = reuse.plan(at)
        masked = min(case.block, length - start) - step % case.block
        kept = min(reuse.feature_rows(case.prompt, length), case.new)
        total += case.shape.macs(predict(case.shape, reuse, plan, length, masked, kept))
    return total


def predict(shape: ModelShape, reuse: Reuse, plan: StepPlan, length: int, head_rows: int, kept: int) -> Counts:
    """Counts of one canvas's step. Threshold policies are predicted at their most: every live row."""
    live, some = len(plan.live), len(plan.live) if plan.budget is None else plan.rows
    counts, dense = Counts(head_rows=head_rows), plan.whole(length)
    for layer in range(shape.layers):
        last = layer == shape.layers - 1
        chooses = layer > 0 and not dense and isinstance(reuse, DLLMCache | DyLLM)
        rows = some if chooses else live
        reads = max(head_rows, kept) if dense and last else rows
        values = rows if isinstance(reuse, DyLLM) else live
        for projection, number in zip(counts.rows, (values, reads, rows, reads, reads), strict=True):
            counts.projected(projection, number)
        counts.attended([reads], [length], read=not dense)
    return counts
