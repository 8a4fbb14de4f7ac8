"""The tables of the speed suite: columns, rows from runs, ratios and plots."""

import statistics

from benchmarks.lib import plots
from benchmarks.lib.bounds import Peaks, denoising_bound
from benchmarks.lib.models import SHAPES, Shape
from benchmarks.lib.process import pinned
from benchmarks.lib.report import Column, columns
from benchmarks.lib.workloads import requests_text

BLOCK = 32  # canvas block of LLaDA's README, for the engine and the loop
#: in the order of the tables
SELECTION = [f"fast_dllm/dual{plus}" for plus in ("", "+wavefilter/serve", "+wavefilter/paper", "+unique")]
METHODS = ["loop", "none", "fast_dllm/dual", "dllm_cache", "dyllm", "fast_dllm/prefix", *SELECTION[1:]]

COLUMNS = columns(
    """
    shape | checkpoint
    method | method
    prompt | prompt
    new | new
    requests | requests
    at_once | most at once
    tokens_per_s | tokens/s | {:,.2f}
    vs_loop | × loop | {:.2f}
    vs_none | × none | {:.2f}
    vs_one | × one request | {:.1f}
    vs_host | time / host's | {:.2f}
    ms_per_step | ms/step | {:.1f}
    median_ms | median step, ms | {:.2f}
    steps | steps timed
    tokens_per_step | tokens / request and step | {:.2f}
    bound_ms | bound, ms | {:.2f}
    bound_by | by
    of_bound | of the bound | {:.0%}
    of_weights | of the weights' bound | {:.0%}
    of_bound_all | of the bound, all steps | {:.0%}
    forward_ms | forward, ms | {:.2f}
    head_ms | head, ms | {:.2f}
    host_ms | rest, ms | {:.2f}
    overhead | engine overhead | {:.1%}
    rows_share | rows recomputed | {:.1%}
    flops_vs_loop | FLOPs / loop | {:.1%}
    flops_vs_none | FLOPs / none | {:.1%}
    kv_share | cached keys read | {:.1%}
    scored | keys scored / step | {:.0f}
    pyramids | pyramid rows made / step | {:.0f}
    launches | launches | {:.0f}
    graph_launches | graphs | {:.1f}
    copies | copies | {:.0f}
    waits | waits | {:.1f}
    others | cores of others | {:.2f}
    failed | failed
    """
)
COLUMNS.insert(-2, Column("seconds", "repetitions", lambda seconds: str(len(seconds))))
NOTES = [
    "tokens/s: response tokens delivered, over the wall time from submission to the last of them; prompts do not "
    f"count. Greedy, ignore_eos, one token per step, canvas blocks of {BLOCK}. Median of the repetitions after a "
    "warm-up.",
    "loop: the published sampling loop on transformers (benchmarks/lib/loops.py), one request. Several requests on a "
    "CPU have ragged prompts from half to one and a half times the stated length; × loop compares with the loop's one "
    "request of the stated length.",
    "ms/step: mean over all steps. median step, its bound and of the bound: that of a partial step, if there is a "
    "cache; all steps: summed, refreshes included. the weights' bound: reading the weights of layers and head once.",
    "If fewer steps than new tokens are timed, they are the first ones, and the tokens filled by them count: all steps "
    "of `none` cost the same.",
    "forward: from the packing of a step's rows to the last layer; head: from there until the host has the tokens; "
    "rest: commits, scheduler and everything else. engine overhead: share of the wall time outside forward and head.",
    "rows recomputed: rows through the feed-forward, of canvas × layers × steps. FLOPs: multiply-adds × 2 of linears, "
    "attention and head, as the engine counts them; for the loop by formula.",
    "time / host's: a selection over a reuse policy, against that policy alone. cached keys read: of those that exist. "
    "keys scored: means and keys that a selection compared with queries; pyramid rows: means it took, both per layer.",
    "most at once: requests of one step; others wait for memory or rows. launches, graphs, copies, waits: per partial "
    "step, by torch.profiler in a run of its own.",
]
SETTINGS = {
    "dtype": "bfloat16",
    "weights": "random",
    "decoding": {"name": "low_confidence", "block_length": BLOCK, "steps": "= new", "temperature": 0},
    "baseline": "in a cell, the published loop (loop), this engine without reuse (none), the reuse policy alone, or "
    "the bound of each step",
    "counted": "response tokens delivered over the wall time from submission to the last of them, medians",
    "threads_pinned": pinned(),
}


def summary(runs: list, shape: Shape, peaks: Peaks, length: float) -> dict:
    """The row of one cell, from its repetitions. `length`: mean length of its canvases"""
    steps = [step for run in runs for step in run.steps]
    bounds = [denoising_bound(shape, step.counts, peaks) for step in steps]
    middle = sorted(range(len(steps)), key=lambda i: steps[i].ms)[len(steps) // 2]
    scheduled = sum(step.requests for step in steps)
    counts, count, layers = [step.counts for step in steps], len(steps), shape.model.layers
    recomputed = sum(each.rows["feed_forward"] for each in counts)
    wall = sum(run.seconds for run in runs)
    row = {
        "at_once": max(step.requests for step in steps),
        "seconds": [run.seconds for run in runs],
        "tokens_per_s": statistics.median(run.tokens / run.seconds for run in runs),
        "steps": len(runs[0].steps),
        "cut": runs[0].cut,
        "tokens_per_step": sum(step.filled for step in steps) / scheduled,
        "ms_per_step": 1e3 * statistics.median(run.seconds / len(run.steps) for run in runs),
        "median_ms": steps[middle].ms,
        "bound_ms": bounds[middle].ms,
        "bound_by": bounds[middle].by,
        "of_bound": bounds[middle].ms / steps[middle].ms,
        "of_weights": 1e3 * shape.weight_bytes() / peaks.bytes_per_s / steps[middle].ms,
        "of_bound_all": sum(one.ms for one in bounds) / sum(step.ms for step in steps),
        "rows_share": recomputed / (layers * scheduled * length),
        "flops": sum(2 * shape.model.macs(step.counts) for step in runs[0].steps),
        "head_rows_per_request_step": sum(each.head_rows for each in counts) / scheduled,
    }
    if sum(each.summaries for each in counts):
        row["kv_share"] = sum(each.keys_read for each in counts) / sum(each.keys_dense for each in counts)
        row["scored"] = sum(each.keys_scored for each in counts) / (layers * count)
        row["pyramids"] = sum(each.summaries for each in counts) / (layers * count)
    if split := [step for step in steps if step.forward_ms is not None and step.head_ms is not None]:
        row["forward_ms"] = statistics.median(step.forward_ms for step in split)
        row["head_ms"] = statistics.median(step.head_ms for step in split)
        row["host_ms"] = statistics.median(step.ms - step.forward_ms - step.head_ms for step in split)
        row["overhead"] = 1 - sum(step.forward_ms + step.head_ms for step in split) / (1e3 * wall)
    return row


def finished(rows: list[dict]) -> list[dict]:
    """Each next to the loop's one request, one request of its kind, `none`, and the reuse policy without selection"""
    cells = {key(row): row for row in rows if "tokens_per_s" in row}
    for row in cells.values():
        reuse, plus, _ = row["method"].partition("+")
        host = cells.get(key(row | {"method": reuse})) if plus else None
        loop = cells.get(key(row | {"method": "loop", "requests": 1}))
        none = cells.get(key(row | {"method": "none"})) if row["method"] != "loop" else None
        one = cells.get(key(row | {"requests": 1}))
        if host:
            row["vs_host"] = row["ms_per_step"] / host["ms_per_step"]
        if one and row["requests"] > 1:
            row["vs_one"] = row["tokens_per_s"] / one["tokens_per_s"]
        for name, base in (("loop", loop), ("none", none)):
            if base:
                row[f"vs_{name}"] = row["tokens_per_s"] / base["tokens_per_s"]
                if "flops" in row and row["requests"] == base["requests"]:
                    row[f"flops_vs_{name}"] = (row["flops"] / row["steps"]) / (base["flops"] / base["steps"])
        if "others" in row:  # a row is as idle as those it is compared with
            row["others"] = max(base.get("others", 0.0) for base in (row, host, loop, none) if base)
    return sorted(rows, key=place)


def place(row: dict) -> tuple:
    """In the table; failures last"""
    shapes = list(SHAPES)
    if "tokens_per_s" not in row:
        return (len(shapes) + 1,)
    shape = shapes.index(row["shape"]) if row["shape"] in shapes else len(shapes)
    method = METHODS.index(row["method"]) if row["method"] in METHODS else len(METHODS)
    return shape, row["prompt"], row["requests"], method, row["method"]


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("shape", "method", "prompt", "requests"))


def bars(rows: list[dict]) -> list[str]:
    found = []
    for row in rows:
        if (row.get("shape"), row.get("method"), row.get("prompt")) != ("llada-8b", "fast_dllm/dual", 1024):
            continue
        if row["requests"] == 1:
            found.append(f"Bar: LLaDA-8B, one request, dual cache, 60% of the weights' bound: {row['of_weights']:.0%}.")
        elif row["requests"] == 32 and "vs_one" in row:
            found.append(f"Bar: 32 requests, 8 times one request's tokens per second: {row['vs_one']:.1f} times.")
    return found


def ratio_shown(rows: list[dict]) -> tuple[str, str]:
    """(field, words) of what a table is about"""
    if any(row["method"] == "loop" for row in rows):
        return "vs_loop", "tokens/s, times those of the loop"
    if any("vs_host" in row for row in rows):
        return "vs_host", "time, of the reuse policy's alone"
    return "vs_none", "tokens/s, times those of none"


def panels(rows: list[dict]) -> dict[str, list[dict]]:
    """shape -> its rows that have a time, without launched steps next to replayed ones"""
    rows = [row for row in rows if "tokens_per_s" in row]
    rows = [row for row in rows if not row["method"].endswith(", eager")] or rows
    return {shape: [row for row in rows if row["shape"] == shape] for shape in dict.fromkeys(r["shape"] for r in rows)}


def plot_ratios(figure, rows: list[dict]) -> None:
    shapes = panels(rows)
    for index, (shape, own) in enumerate(shapes.items()):
        axes, groups = figure.add_subplot(1, len(shapes), index + 1), {}
        field, words = ratio_shown(own)
        for row in own:
            value = row.get(field, 1.0 if field == "vs_host" else None)
            groups.setdefault(f"{row['prompt']:,} + {row['new']}\n× {row['requests']}", {})[row["method"]] = value
        plots.bars(axes, groups, words)
        axes.set_xlabel(f"{shape}: prompt + new tokens × requests", fontsize=8)


def plot_bounds(figure, rows: list[dict]) -> None:
    """At the prompt with most cells, how near each policy is to its bound"""
    shapes = panels([row for row in rows if "of_bound" in row])
    for index, (shape, own) in enumerate(shapes.items()):
        axes, groups = figure.add_subplot(len(shapes), 1, index + 1), {}
        prompts = [row["prompt"] for row in own]
        prompt = max(prompts, key=lambda prompt: (prompts.count(prompt), prompt == 1024))
        for row in own:
            if row["prompt"] == prompt:
                groups.setdefault(requests_text(row["requests"]), {})[row["method"]] = 100 * row["of_bound"]
        plots.bars(axes, groups, f"{shape}\n% of the bound", "{:.0f}")
        axes.set_xlabel(f"{prompt:,} prompt tokens", fontsize=8)
