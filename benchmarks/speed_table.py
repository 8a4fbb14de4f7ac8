"""The table of the speed command: its columns, rows, ratios and plot."""

import statistics
from dataclasses import asdict

from benchmarks import drawing, report
from benchmarks.checkpoints import SHAPES, Shape
from benchmarks.workload import Cell, Policy

COLUMNS = [
    report.Column("shape", "checkpoint"),
    report.Column("method", "method"),
    report.Column("prompt", "prompt"),
    report.Column("new", "new"),
    report.Column("batch", "requests"),
    report.Column("tokens_per_s", "tokens/s", "{:.2f}"),
    report.Column("vs_loop", "× loop", "{:.2f}"),
    report.Column("vs_none", "× none", "{:.2f}"),
    report.Column("vs_host", "time / host's", "{:.2f}"),
    report.Column("ms_per_step", "ms/step", "{:.1f}"),
    report.Column("awaited", "steps timed"),
    report.Column("seconds", "repetitions", lambda seconds: str(len(seconds))),
    report.Column("rows_share", "rows recomputed", "{:.1%}"),
    report.Column("flops_vs_loop", "FLOPs / loop", "{:.1%}"),
    report.Column("flops_vs_none", "FLOPs / none", "{:.1%}"),
    report.Column("overhead", "engine overhead", "{:.1%}"),
    report.Column("others", "cores of others", "{:.2f}"),
    report.Column("kv_share", "cached keys read", "{:.1%}"),
    report.Column("scored", "keys scored / step", "{:.0f}"),
    report.Column("pyramids", "pyramid rows made / step", "{:.0f}"),
]

NOTES = [
    "tokens/s: response tokens delivered, over the wall time from submission to the last of them; prompts do "
    "not count. Greedy, ignore_eos, one token per step, block length 32. Median of the repetitions after a "
    "warm-up.",
    "loop: LLaDA's sampling loop on transformers (benchmarks/reference_loop.py), one request: all rows "
    "through all layers and the head, softmax and argmax over [1, N, V], no attention mask, SDPA.",
    "Several requests have ragged prompts from half to one and a half times the stated length (their mean), "
    "queued before the first step; '× loop' compares with the loop's one request of the stated length.",
    "rows recomputed: rows through the feed-forward, of canvas × layers × steps. FLOPs: multiply-adds × 2 of "
    "linears, attention and head, counted where the rows arrive; for the loop by formula.",
    "time / host's: of a selection over a reuse policy, against that policy alone. cached keys read: of those "
    "that are there. keys scored: means and keys a selection compared with queries; pyramid rows: means it took. "
    "Both per layer.",
    "engine overhead: share of the wall time outside forward and head (scheduler, processes, packing, "
    "committing, detokenising). cores of others: used by other processes meanwhile, at most.",
    "steps timed: where fewer than new tokens, the first ones of the first block: with `none` every step "
    "recomputes every row, so all of them cost the same.",
]

COUNTED = "response tokens delivered over the wall time from submission to the last of them, medians of repetitions"
BASELINE = (
    "in a cell, LLaDA's sampling loop on transformers (loop), this engine without reuse (none), "
    "or the reuse policy alone"
)


def base_row(shape: Shape, method: str, cell: Cell, seconds: list[float]) -> dict:
    middle = statistics.median(seconds)
    return {
        "shape": shape.name,
        "method": method,
        **asdict(cell),
        "seconds": seconds,
        "awaited": cell.steps,
        # at one token per step, which is what every method is run at
        "tokens_per_s": cell.batch * cell.steps / middle,
        "ms_per_step": 1000 * middle / cell.steps,
    }


def engine_row(shape: Shape, policy: Policy, cell: Cell, runs: list[dict]) -> dict:
    def median(value) -> float:
        return statistics.median(value(run) for run in runs)

    counts = runs[0]  # greedy: every repetition runs the same steps
    return base_row(shape, policy.label, cell, [run["seconds"] for run in runs]) | {
        "steps": counts["steps"],
        "flops": counts["flops"],
        "rows_share": counts["rows"] / (shape.layers * cell.rows() * cell.steps),
        "kv_share": counts["keys_read"] / counts["keys_dense"] if counts.get("summaries") else None,
        "scored": counts["keys_scored"] / (shape.layers * counts["steps"]) if counts.get("summaries") else None,
        "pyramids": counts["summaries"] / (shape.layers * counts["steps"]) if counts.get("summaries") else None,
        "head_rows_per_request_step": counts["head_rows"] / (cell.batch * cell.steps),
        "overhead": median(lambda run: 1 - (run["forward"] + run["head"]) / run["seconds"]),
        "share_of_time": {
            "forward": median(lambda run: run["forward"] / run["seconds"]),
            "head": median(lambda run: run["head"] / run["seconds"]),
            "worker, outside the model": median(
                lambda run: (run["worker"] - run["forward"] - run["head"]) / run["seconds"]
            ),
            "outside the worker": median(lambda run: 1 - run["worker"] / run["seconds"]),
        },
    }


def with_ratios(rows: list[dict]) -> list[dict]:
    """Of one checkpoint: against the loop's one request of the same prompt, `none` in the same cell, and the
    reuse policy without a selection. A row is as idle as those it is compared with."""
    cell_of = {(row["method"], row["prompt"], row["batch"]): row for row in rows}
    for row in rows:
        prompt, batch = row["prompt"], row["batch"]
        reuse, plus, _ = row["method"].partition("+")
        cell = Cell(prompt, row["new"], batch, row["blocks"], row["steps_per_block"])
        row["flops_vs_loop"] = row["flops"] / cell.dense_flops(SHAPES[row["shape"]])
        host = cell_of.get((reuse, prompt, batch)) if plus else None
        loop = cell_of.get(("loop", prompt, 1))
        none = cell_of.get(("none", prompt, batch)) if row["method"] != "loop" else None
        if host:
            row["vs_host"] = row["ms_per_step"] / host["ms_per_step"]
        if loop:
            row["vs_loop"] = row["tokens_per_s"] / loop["tokens_per_s"]
        if none:
            row["vs_none"] = row["tokens_per_s"] / none["tokens_per_s"]
            row["flops_vs_none"] = (row["flops"] / row["awaited"]) / (none["flops"] / none["awaited"])
        if "others" in row:
            row["others"] = max(base.get("others", 0.0) for base in (row, host, loop, none) if base)
    return rows


def order(rows: list[dict], shapes: list[str], cells: list[Cell], methods: list[str]) -> list[dict]:
    """As asked for, whatever was measured first."""
    places = [(cell.prompt, cell.batch) for cell in cells]
    return sorted(
        rows,
        key=lambda row: (
            shapes.index(row["shape"]), places.index((row["prompt"], row["batch"])),
            methods.index(row["method"]),
        ),
    )  # fmt: skip


def against(rows: list[dict]) -> tuple[str, str]:
    """(field, words) of the ratio that a table is about."""
    if any(row["method"] == "loop" for row in rows):
        return "vs_loop", "tokens/s, times those of the loop"
    if any("vs_host" in row for row in rows):
        return "vs_host", "time, of the reuse policy's alone"
    return "vs_none", "tokens/s, times those of none"


def plot(figure, rows: list[dict]) -> None:
    """What the table is about, as bars; one picture of them per checkpoint."""
    field, words = against(rows)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    grid = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axes, shape in zip(grid, shapes, strict=True):
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["shape"] == shape:
                place = f"{row['prompt']:,} + {row['new']}\n× {row['batch']}"
                groups.setdefault(place, {})[row["method"]] = row.get(field, 1.0 if field == "vs_host" else None)
        drawing.bars(axes, groups, words)
        axes.set_xlabel(f"{shape}: prompt + new tokens × requests", fontsize=8)
