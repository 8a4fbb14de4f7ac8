"""What the policies cost on the real models' shapes, from the plans and the cost model alone: no weights needed.

The cost model is checked against counted rows and query-key pairs in
tests/engine/test_reuse.py. One token per step; multiply-adds of linears,
attention and head.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import report
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan
from vllm_dlm.plugins.reuse.dllm_cache import DLLMCache
from vllm_dlm.plugins.reuse.dyllm import DyLLM
from vllm_dlm.plugins.reuse.fast_dllm import FastDLLM
from vllm_dlm.plugins.reuse.none import Dense
from vllm_dlm.step.counts import Counts, ModelShape

SHAPES = {
    "LLaDA-8B": ModelShape(32, 4096, 32, 32, 128, 12288, 126464),
    "Dream-7B": ModelShape(28, 3584, 28, 4, 128, 18944, 152064),
}


@dataclass(frozen=True)
class Setting:
    name: str
    shape: str
    prompt: int
    new: int
    block: int
    reuse: Reuse
    published: str = ""


SETTINGS = [
    Setting(
        "LongBench-HotpotQA",
        "LLaDA-8B",
        4096,
        32,
        32,
        DLLMCache(prompt_interval=100, response_interval=8),
        "9.1x FLOPs (dLLM-Cache)",
    ),
    Setting(
        "LongBench-HotpotQA, 12k",
        "LLaDA-8B",
        12000,
        32,
        32,
        DLLMCache(prompt_interval=100, response_interval=8),
        "9.1x FLOPs (dLLM-Cache)",
    ),
    Setting("GSM8K 4-shot", "LLaDA-8B", 893, 256, 8, DLLMCache()),
    Setting("GSM8K 4-shot", "LLaDA-8B", 893, 256, 8, DyLLM(), "7.0x tokens/s (DyLLM)"),
    Setting("GSM8K 4-shot", "LLaDA-8B", 893, 256, 32, FastDLLM()),
    Setting("GSM8K 8-shot", "Dream-7B", 893, 256, 256, DLLMCache(prompt_interval=25, response_interval=2)),
]

COLUMNS = [
    report.Column("name", "setting"),
    report.Column("shape", "model"),
    report.Column("prompt", "prompt"),
    report.Column("new", "new"),
    report.Column("policy", "policy"),
    report.Column("vs_none", "none / policy", "{:.1f}x"),
    report.Column("vs_reference", "reference loop / policy", "{:.1f}x"),
    report.Column("published", "published"),
]

NOTES = [
    "none: this engine's exact policy (head and last layer on the rows that are read). reference loop: every row "
    "through every layer and the head, as the published code has it.",
    "Threshold policies (dyllm) are counted at their most: every live row recomputed.",
]


def add_arguments(parser) -> None:
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    result = report.Report(
        name="costs", title="Multiply-adds of published settings, by the cost model",
        settings={
            "shapes": {name: vars(shape) for name, shape in SHAPES.items()}, "dtype": "any",
            "baseline": "this engine's exact policy (none) and the published loop (reference loop)",
            "counted": "multiply-adds of linears, attention and head, by formula, one token per step",
        "machine": {"note": "by formula, on no machine"}, "versions": report.versions(),
            "load": {"note": "nothing in this table is a time"},
        },
        columns=COLUMNS, notes=NOTES, rows=[row(setting) for setting in SETTINGS],
    )  # fmt: skip
    result.print()
    for path in result.write(args.results):
        print(path)


def row(setting: Setting) -> dict:
    policy, none = macs(setting, setting.reuse), macs(setting, Dense())
    reference = reference_macs(setting)
    return {
        "name": setting.name, "shape": setting.shape, "prompt": setting.prompt, "new": setting.new,
        "policy": label(setting.reuse), "vs_none": none / policy, "vs_reference": reference / policy,
        "published": setting.published,
    }  # fmt: skip


def label(reuse: Reuse) -> str:
    """Its name, and the fields that are not at their defaults."""
    default = type(reuse)()
    changed = [f"{name}={value}" for name, value in vars(reuse).items() if value != getattr(default, name)]
    return " ".join([reuse.name, *changed])


def macs(setting: Setting, reuse: Reuse) -> int:
    """Of a whole response at one token per step."""
    shape, length, total = SHAPES[setting.shape], setting.prompt + setting.new, 0
    nothing = np.zeros(0, np.int64)  # these policies go by the clock
    shift = int(setting.shape.startswith("Dream"))
    for step in range(setting.new):
        start = setting.prompt + step // setting.block * setting.block
        at = Progress(
            setting.prompt, length, (start, min(start + setting.block, length)), step % setting.block, step, step == 0,
            shift, mask_id=0, tokens=nothing, confidence=nothing, changed=nothing,
        )  # fmt: skip
        plan = reuse.plan(at)
        masked = min(setting.block, length - start) - step % setting.block
        kept = min(reuse.feature_rows(setting.prompt, length), setting.new)
        total += shape.macs(predict(shape, reuse, plan, length, masked, kept))
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


def reference_macs(setting: Setting) -> int:
    shape, length = SHAPES[setting.shape], setting.prompt + setting.new
    counts = Counts(head_rows=length)
    for _ in range(shape.layers):
        for phase in counts.rows:
            counts.projected(phase, length)
        counts.attended([length], [length], read=False)
    return setting.new * shape.macs(counts)
