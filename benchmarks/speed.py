"""Tokens per second of the plain loop on transformers and of this engine, per policy, in one table.

Random LLaDA-shaped checkpoints, bfloat16 on the CPU, greedy, one token per
step. The loop and the engine run one after the other on the same cores with
the same OpenMP and the same number of threads.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import report
from benchmarks.cells import BLOCK, Cell, Policy
from benchmarks.checkpoints import SHAPES, Shape, checkpoint
from benchmarks.measure import Engine, loop_environment

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
    report.Column("rows_share", "rows recomputed", "{:.1%}"),
    report.Column("flops_vs_loop", "FLOPs / loop", "{:.1%}"),
    report.Column("flops_vs_none", "FLOPs / none", "{:.1%}"),
    report.Column("overhead", "engine overhead", "{:.1%}"),
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
    "time / host's: of a selection over a reuse policy, against that policy alone. cached keys read: of those that are "
    "there. keys scored: means and keys a selection compared with queries; pyramid rows: means it took. Both per layer.",
    "engine overhead: share of the wall time outside forward and head (scheduler, processes, packing, "
    "committing, detokenising).",
]


def listed(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def add_arguments(parser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--policy", action="append", help="reuse policy, NAME or NAME:field=value,…; repeatable"
    )
    parser.add_argument("--shapes", type=listed(str), help=f"of {', '.join(SHAPES)}; default: the first two")
    parser.add_argument(
        "--prompts", type=listed(int), help="prompt lengths; default 480 (with --new: 512 positions)"
    )
    parser.add_argument(
        "--new", type=int, default=32, help=f"response tokens, a multiple of {BLOCK} (default 32)"
    )
    parser.add_argument(
        "--blocks", type=int, help=f"time the first BLOCKS blocks of {BLOCK} tokens only (default all)"
    )
    parser.add_argument("--batches", type=listed(int), default=[1, 8], help="requests at once (default 1,8)")
    parser.add_argument(
        "--none-steps", type=int, help="time `none` over so many steps only (all of its steps cost the same)"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=40, help="no further repetition of a cell after this long"
    )
    parser.add_argument("--threads", type=int, default=cores, help=f"for loop and engine (default {cores})")
    parser.add_argument("--no-loop", action="store_true", help="leave the reference loop away")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds on a toy shape")
    parser.add_argument("--name", help="of the result files; default speed-POLICIES")
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    policies = [Policy.parse(text) for text in args.policy or ["none"]]
    shapes = [SHAPES[name] for name in args.shapes or (["smoke"] if args.quick else list(SHAPES)[:2])]
    if args.new % BLOCK:
        raise SystemExit(f"--new: {args.new} is not a multiple of the block length {BLOCK}")
    blocks = min(args.blocks or args.new, args.new // BLOCK)
    prompts = args.prompts or [96 if args.quick else 480]
    cells = [Cell(prompt, args.new, batch, blocks) for prompt in prompts for batch in args.batches]
    about = settings(shapes, cells, policies, args)
    rows = []
    units = len(shapes) * (len(cells) * len(policies) + (not args.no_loop))
    with tqdm(total=units, desc="speed", unit="cell") as progress:
        for shape in shapes:
            rows += measure_shape(shape, cells, policies, args, progress)
    result = report.Report(
        name=args.name or "speed-" + "-".join(policy.label.split(":")[0].replace("/", ".") for policy in policies),
        title="Speed of one-token-per-step denoising: " + ", ".join(policy.label for policy in policies),
        settings=about | {"load_average_after": report.load_average()},
        columns=[column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)],
        notes=NOTES + setting_notes(about, cells),
        rows=rows,
    )
    result.print()
    for path in result.write(args.results, plot):
        print(path)


def settings(shapes, cells, policies, args) -> dict:
    return {
        "model": {shape.name: shape.describe() for shape in shapes},
        "weights": "random, normal(0, 0.02), seed 0",
        "dtype": "bfloat16",
        "decoding": {"name": "low_confidence", "block_length": BLOCK, "steps": "= new", "temperature": 0},
        "policies": {
            policy.label: {"server": policy.server, "request": policy.request} for policy in policies
        },
        "prompt_lengths": {f"{cell.prompt} x {cell.batch}": str(cell.lengths()) for cell in cells},
        "repetitions": f"{args.repetitions}, fewer when a cell takes more than {args.seconds:g} s",
        "baseline": "reference loop on transformers, one request; for policies: none",
        "machine": report.machine(args.threads),
        "versions": report.versions(),
        "load_average_before": report.load_average(),
    }


def setting_notes(about: dict, cells: list[Cell]) -> list[str]:
    notes = [
        f"{name}: {shape['parameters'] / 1e6:.1f}M parameters, the head is "
        f"{shape['head_share_of_parameters']:.1%} of them (LLaDA-8B: 6.5%) and "
        f"{shape['head_share_of_dense_flops_at_512']:.1%} of the loop's FLOPs at 512 positions."
        for name, shape in about["model"].items()
    ]
    machine = about["machine"]
    notes.append(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads for loop and engine alike."
    )
    if about["load_average_before"] > 0.5:
        notes.append(f"The machine was not idle: load average {about['load_average_before']} before the run.")
    if any(cell.blocks * BLOCK < cell.new for cell in cells):
        notes.append(f"Timed up to the end of block {cells[0].blocks} of each response; the rest is aborted.")
    return notes


def measure_shape(shape: Shape, cells: list[Cell], policies: list[Policy], args, progress) -> list[dict]:
    folder = checkpoint(shape)
    rows = []
    if not args.no_loop:
        progress.set_postfix_str(f"{shape.name} loop")
        singles = [replace(cell, batch=1) for cell in {cell.prompt: cell for cell in cells}.values()]
        for cell, seconds in zip(singles, loop_seconds(shape, folder, singles, args), strict=True):
            rows.append(base_row(shape, "loop", cell, seconds) | {"flops": cell.dense_flops(shape)})
        progress.update()
    for server in {json.dumps(policy.server): policy.server for policy in policies}.values():
        engine = Engine(folder, shape, server, cells, args.threads)
        for policy in (policy for policy in policies if policy.server == server):
            for cell in cells:
                progress.set_postfix_str(f"{shape.name} {policy.label} {cell.prompt} x {cell.batch}")
                timed = cell.short(args.none_steps) if args.none_steps and policy.label == "none" else cell
                runs = engine.measure(timed, policy.request, args.repetitions, args.seconds)
                rows.append(engine_row(shape, policy, timed, runs))
                progress.update()
        engine.close()
    return with_ratios(rows, shape)


def loop_seconds(shape: Shape, folder: Path, cells: list[Cell], args) -> list[list[float]]:
    """Of each cell's repetitions, from a process of its own."""
    job = {
        "checkpoint": str(folder),
        "dtype": "bfloat16",
        "threads": args.threads,
        "mask_id": shape.mask_id,
        "block": BLOCK,
        "repetitions": args.repetitions,
        "seconds": args.seconds,
        "cells": [
            {"prompt": cell.prompts(shape)[0], "new": cell.new, "blocks": cell.blocks} for cell in cells
        ],
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.reference_loop"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | loop_environment(args.threads),
    )
    return [json.loads(line)["seconds"] for line in done.stdout.splitlines()]


def base_row(shape: Shape, method: str, cell: Cell, seconds: list[float]) -> dict:
    middle = statistics.median(seconds)
    return {
        "shape": shape.name,
        "method": method,
        **asdict(cell),
        "seconds": [round(second, 4) for second in seconds],
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
        "awaited": cell.steps,
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


def with_ratios(rows: list[dict], shape: Shape) -> list[dict]:
    """Against the loop's one request of the same prompt, and against `none` in the same cell."""
    loop = {row["prompt"]: row for row in rows if row["method"] == "loop"}
    none = {(row["prompt"], row["batch"]): row for row in rows if row["method"] == "none"}
    alone = {(row["method"], row["prompt"], row["batch"]): row for row in rows}
    for row in rows:
        if host := alone.get((row["method"].split("+")[0], row["prompt"], row["batch"])) if "+" in row["method"] else None:
            row["vs_host"] = row["ms_per_step"] / host["ms_per_step"]
        cell = Cell(row["prompt"], row["new"], row["batch"], row["blocks"], row["steps_per_block"])
        row["flops_vs_loop"] = row["flops"] / cell.dense_flops(shape)
        if base := loop.get(row["prompt"]):
            row["vs_loop"] = row["tokens_per_s"] / base["tokens_per_s"]
        if row["method"] != "loop" and (base := none.get((row["prompt"], row["batch"]))):
            row["vs_none"] = row["tokens_per_s"] / base["tokens_per_s"]
            row["flops_vs_none"] = (row["flops"] / row["awaited"]) / (base["flops"] / base["awaited"])
    return rows


def plot(axes, rows: list[dict]) -> None:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        group = groups.setdefault(f"{row['shape']}\nprompt {row['prompt']}, {row['new']} new", {})
        requests = "1 request" if row["batch"] == 1 else f"{row['batch']} requests"
        group[f"{row['method']}, {requests}"] = row["tokens_per_s"]
    report.grouped_bars(axes, groups, "tokens/s")
