"""The table of denoising on a GPU: steps and tokens per second of the policies on the real models' shapes, beside
what the weights, the cached keys and the multiply-adds of each step take at least."""

import statistics
from dataclasses import dataclass

from benchmarks import drawing, report
from benchmarks.gpu_engine import DenoisingEngine
from benchmarks.gpu_parts import Cell, Part
from benchmarks.gpu_shapes import SHAPES, Peaks, denoising_bound, in_order, panels

BLOCK = 32

TITLE = "Denoising speed"
COLUMNS = [
    report.Column("shape", "shape"),
    report.Column("method", "method"),
    report.Column("prompt", "prompt"),
    report.Column("new", "new"),
    report.Column("requests", "requests"),
    report.Column("at_once", "at most at once"),
    report.Column("tokens_per_s", "tokens/s", "{:,.1f}"),
    report.Column("vs_one", "× one request", "{:.1f}"),
    report.Column("vs_none", "× none", "{:.1f}"),
    report.Column("steps", "steps"),
    report.Column("steps_per_s", "steps/s", "{:,.1f}"),
    report.Column("tokens_per_step", "tokens / request and step", "{:.2f}"),
    report.Column("ms_per_step", "ms/step", "{:.2f}"),
    report.Column("bound_ms", "bound ms", "{:.2f}"),
    report.Column("bound_by", "by"),
    report.Column("of_bound", "of the bound", "{:.0%}"),
    report.Column("of_weights", "of the weights' bound", "{:.0%}"),
    report.Column("of_bound_all", "of the bound, all steps", "{:.0%}"),
    report.Column("forward_ms", "forward ms", "{:.2f}"),
    report.Column("head_ms", "head ms", "{:.2f}"),
    report.Column("host_ms", "rest ms", "{:.2f}"),
    report.Column("launches", "launches", "{:.0f}"),
    report.Column("graph_launches", "graphs", "{:.1f}"),
    report.Column("copies", "copies", "{:.0f}"),
    report.Column("waits", "waits", "{:.1f}"),
    report.Column("rows_share", "rows recomputed", "{:.1%}"),
    report.Column("failed", "failed"),
]
SETTINGS = {
    "dtype": "bfloat16",
    "weights": "random, made on the device (vLLM's load_format=dummy)",
    "decoding": {"block_length": BLOCK, "threshold": 0.9, "temperature": 0},
    "baseline": "the bound of each step: what its weights, cached keys and multiply-adds take at the device's peak",
    "counted": "response tokens delivered over the wall time from the first step to the last of them; prompts do not "
    "count",
}
NOTES = [
    "Random weights are never 0.9 sure of a token: each request fills about one token per step (tokens / request and "
    "step), where a trained model fills several. Time per step is what the bounds are about.",
    "Where fewer steps than new tokens were timed, the first ones alone were, and the tokens filled by them count: "
    "all steps of `none` cost the same.",
    "ms/step, its bound and of the bound: of the median step, which with a cache is a partial one; all steps: summed, "
    "refreshes included. the weights' bound: reading the weights of layers and head once.",
    "forward: from the packing of a step's rows to the last layer's last kernel; head: from there until the host has "
    "the tokens; rest: committing them, the scheduler, all else. launches, graphs, copies and waits: per partial step, "
    "by torch.profiler in a run of its own.",
    "at most at once: requests of one step; others wait for memory or for room among the rows of a step. Rows "
    "recomputed: through the feed-forward, of canvas × layers, with those that ride along masked.",
]


@dataclass(frozen=True)
class Engine:
    shape: str
    rows: int  # of a step, at most
    requests: int
    length: int  # of a canvas, at most
    eager: bool = False


@dataclass(frozen=True)
class Canvases:
    policy: str
    prompt: int
    requests: int
    new: int = 2 * BLOCK
    steps: int | None = None  # the first ones alone
    seconds: float = 4.0  # no further repetition after so many


def opened(part: Part, peaks: Peaks):
    from benchmarks.workload import Policy

    wanted: Engine = part.engine
    shape = SHAPES[wanted.shape]
    engine = DenoisingEngine(shape, wanted.rows, wanted.requests, wanted.length, wanted.eager)

    def measure(cell: Cell) -> dict:
        own: Canvases = cell.what
        options = {"dlm_block_length": BLOCK, "dlm_threshold": 0.9} | Policy.parse(own.policy).request
        work = (own.prompt, own.new, own.requests, options)
        engine.run(*work, steps=own.steps)  # captures what it meets
        runs = []
        while not runs or (len(runs) < 3 and sum(run.seconds for run in runs) < own.seconds):
            runs.append(engine.run(*work, steps=own.steps))
        row = {"shape": shape.name, "method": own.policy + (", eager" if wanted.eager else "")}
        row |= {"prompt": own.prompt, "new": own.new, "requests": own.requests}
        row |= summary(runs, shape, peaks, own.prompt + own.new)
        return row | engine.profiled(*work, steps=own.steps)

    return measure


def summary(runs: list, shape, peaks: Peaks, length: int) -> dict:
    """Of repetitions of one cell."""
    steps = [step for run in runs for step in run.steps]
    bounds = [denoising_bound(shape, step.counts, peaks) for step in steps]
    middle = sorted(range(len(steps)), key=lambda i: steps[i].ms)[len(steps) // 2]
    weights = 1e3 * shape.weight_bytes() / peaks.bytes_per_s
    scheduled = sum(step.requests for step in steps)
    recomputed = sum(step.counts.rows["feed_forward"] for step in steps)
    row = {
        "at_once": max(step.requests for step in steps),
        "seconds": [run.seconds for run in runs],
        "tokens_per_s": statistics.median(run.tokens / run.seconds for run in runs),
        "steps": len(runs[0].steps), "cut": runs[0].cut,
        "steps_per_s": statistics.median(len(run.steps) / run.seconds for run in runs),
        "tokens_per_step": sum(step.filled for step in steps) / scheduled,
        "ms_per_step": steps[middle].ms, "bound_ms": bounds[middle].ms, "bound_by": bounds[middle].by,
        "of_bound": bounds[middle].ms / steps[middle].ms, "of_weights": weights / steps[middle].ms,
        "of_bound_all": sum(one.ms for one in bounds) / sum(step.ms for step in steps),
        "rows_share": recomputed / (shape.model.layers * length * scheduled),
    }  # fmt: skip
    split = [step for step in steps if step.forward_ms is not None and step.head_ms is not None]
    if split:
        row["forward_ms"] = statistics.median(step.forward_ms for step in split)
        row["head_ms"] = statistics.median(step.head_ms for step in split)
        row["host_ms"] = statistics.median(step.ms - step.forward_ms - step.head_ms for step in split)
    return row


def finished(rows: list[dict]) -> list[dict]:
    """In the order of shapes, prompts and requests, each beside one request of its kind and beside `none`."""
    names = ("shape", "method", "prompt", "requests")
    known = {tuple(row[name] for name in names): row for row in rows if "ms_per_step" in row}
    for (shape, method, prompt, requests), row in known.items():
        if one := known.get((shape, method, prompt, 1)):
            row["vs_one"] = row["tokens_per_s"] / one["tokens_per_s"]
        if none := known.get((shape, "none", prompt, requests)):
            row["vs_none"] = row["tokens_per_s"] / none["tokens_per_s"]
    return in_order(rows, "prompt", "requests", "method")


def bars(rows: list[dict]) -> list[str]:
    told = []
    for row in rows:
        if (row.get("shape"), row.get("method"), row.get("prompt")) != ("llada-8b", "fast_dllm/dual", 1024):
            continue
        if row["requests"] == 1:
            told.append(f"Bar: LLaDA-8B, one request, dual cache, 60% of the weights' bound: {row['of_weights']:.0%}.")
        elif row["requests"] == 32 and "vs_one" in row:
            told.append(f"Bar: 32 requests, 8 times one request's tokens per second: {row['vs_one']:.1f} times.")
    return told


def plot(figure, rows: list[dict]) -> None:
    """How near each policy is to its bound, by requests; a panel per shape, at the prompt with most cells. Launched
    steps, beside replayed ones, are in the table alone."""
    rows = [row for row in rows if not row.get("method", "").endswith(", eager")] or rows
    methods = list(dict.fromkeys(row["method"] for row in rows if "ms_per_step" in row))
    for axes, shape, own in panels(figure, rows):
        own.sort(key=lambda row: methods.index(row["method"]))
        prompts = [row["prompt"] for row in own]
        prompt = max(prompts, key=lambda prompt: (prompts.count(prompt), prompt == 1024))
        groups: dict[str, dict[str, float]] = {}
        for row in own:
            if row["prompt"] == prompt:
                count = row["requests"]
                group = groups.setdefault(f"{count} request{'s' * (count > 1)}", {})
                group[row["method"]] = 100 * row["of_bound"]
        drawing.bars(axes, groups, f"{shape}\n% of the bound", "{:.0f}")
        axes.set_xlabel(f"{prompt:,} prompt tokens", fontsize=8)
