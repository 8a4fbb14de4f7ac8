"""Tokens per second of the plain loop on transformers and of this engine, per policy, in one table.

Random LLaDA-shaped checkpoints, bfloat16 on the CPU, greedy, one token per
step. The loop and the engine run one after the other on the same cores with
the same OpenMP and the same number of threads. Every cell is written as soon
as it is measured.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import load, report, speed_blocks, speed_rules
from benchmarks.checkpoints import SHAPES, Shape, checkpoint
from benchmarks.speed_table import (
    BASELINE,
    COLUMNS,
    COUNTED,
    NOTES,
    base_row,
    engine_row,
    order,
    plot,
    with_ratios,
)
from benchmarks.timed_engine import Engine, loop_environment, pinned
from benchmarks.workload import BLOCK, Cell, Policy

LOOP = "loop"


def listed(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def place(text: str) -> tuple[int, int]:
    prompt, _, batch = text.partition("x")
    return int(prompt), int(batch)


def add_arguments(parser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--policy", action="append", help="reuse policy, NAME or NAME:field=value,…; repeatable")
    parser.add_argument("--shapes", type=listed(str), help=f"of {', '.join(SHAPES)}; default: the first two")
    parser.add_argument(
        "--cells", type=listed(place), metavar="PROMPTxREQUESTS,…",
        help="prompt lengths and requests at once; default 480x1,480x8 (with --new: 512 positions)",
    )  # fmt: skip
    parser.add_argument("--only", type=listed(place), metavar="PROMPTxREQUESTS,…", help="of --cells, in this call")
    parser.add_argument("--new", type=int, default=32, help=f"response tokens, a multiple of {BLOCK} (default 32)")
    parser.add_argument("--blocks", type=int, help=f"time the first BLOCKS blocks of {BLOCK} tokens only (default all)")
    parser.add_argument(
        "--none-steps", type=int, help="time `none` over so many steps only (all of its steps cost the same)"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40, help="no further repetition of a cell after this long")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--resume", action="store_true", help="keep what the result file has under the same settings")
    parser.add_argument("--threads", type=int, default=cores, help=f"for loop and engine (default {cores})")
    parser.add_argument("--no-loop", action="store_true", help="leave the reference loop away")
    parser.add_argument(
        "--rules", action="store_true", help="several tokens a step, windows and drafts on the demo checkpoint, instead"
    )
    parser.add_argument(
        "--block-models",
        action="store_true",
        help="LLaDA2's and SDAR's proportions beside their published loops, instead",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds on a toy shape")
    parser.add_argument("--title", default="Speed of one-token-per-step denoising")
    parser.add_argument("--name", help="of the result files; default speed-POLICIES")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    load.add_arguments(parser)


def run(args) -> None:
    if args.rules:
        return run_rules(args)
    if args.block_models:
        return run_block_models(args)
    policies = [Policy.parse(text) for text in args.policy or ["none"]]
    shapes = [SHAPES[name] for name in args.shapes or (["smoke"] if args.quick else list(SHAPES)[:2])]
    if args.new % BLOCK:
        raise SystemExit(f"--new: {args.new} is not a multiple of the block length {BLOCK}")
    blocks = min(args.blocks or args.new, args.new // BLOCK)
    places = args.cells or [(96 if args.quick else 480, batch) for batch in (1, 8)]
    cells = [Cell(prompt, args.new, batch, blocks) for prompt, batch in places]
    Speed(shapes, cells, policies, args).run()


def run_rules(args) -> None:
    import torch

    from benchmarks.quality import Engine

    around, rows = load.settle(args.busy or args.quick, args.patience), []
    engine = Engine(max_model_len=speed_rules.PROMPT + speed_rules.NEW, rows=8 * (speed_rules.PROMPT + speed_rules.NEW))
    samples = speed_rules.samples(8)
    for requests in (1, 8):
        for method in speed_rules.methods(requests):
            with around.watch() as watch:
                row = speed_rules.measure(engine, method, requests, samples, 1 if args.quick or requests > 1 else 3)
            rows.append(row | {"others": watch.others})
            print({key: value for key, value in row.items() if key != "texts"}, flush=True)
    result = report.Report(
        args.name or "speed-rules", speed_rules.TITLE,
        speed_rules.settings() | report.surroundings(torch.get_num_threads(), around),
        speed_rules.COLUMNS, speed_rules.NOTES, speed_rules.finished(rows),
    )  # fmt: skip
    result.print()
    for path in result.write(args.results, speed_rules.plot):
        print(path)


def run_block_models(args) -> None:
    around, rows = load.settle(args.busy or args.quick, args.patience), []
    shapes = speed_blocks.TOYS if args.quick else speed_blocks.SHAPES
    for shape in shapes:
        measured = speed_blocks.measured(shape, args.threads, 1 if args.quick else args.repetitions)
        while True:
            with around.watch() as watch:
                row = next(measured, None)
            if row is None:
                break
            rows.append(row | watch.beside)
            print(row, flush=True)
    result = report.Report(
        args.name or "speed-blocks", speed_blocks.TITLE,
        speed_blocks.settings(shapes) | report.surroundings(args.threads, around),
        speed_blocks.COLUMNS, speed_blocks.NOTES, rows,
    )  # fmt: skip
    result.print()
    for path in result.write(args.results, speed_blocks.plot):
        print(path)


class Speed:
    """One table: what of it is known, what is missing, and how that is measured."""

    def __init__(self, shapes: list[Shape], cells: list[Cell], policies: list[Policy], args):
        self.shapes, self.cells, self.policies, self.args = shapes, cells, policies, args
        self.name = args.name or "speed-" + "-".join(p.label.split(":")[0].replace("/", ".") for p in policies)
        self.settings = settings(shapes, cells, policies, args)
        self.path = args.results / f"{self.name}.json"
        old = report.resumed(self.path, self.settings, args.threads, args.busy or args.quick) if args.resume else None
        self.rows, self.earlier = (old["rows"], old["settings"]["load"]) if old else ([], None)

    def run(self) -> None:
        missing = {shape.name: self.missing(shape) for shape in self.shapes}
        if not any(missing.values()):
            print(f"{self.path.name} has all of it already")
            return
        self.load = load.settle(self.args.busy or self.args.quick, self.args.patience)
        self.end = time.monotonic() + 60 * (self.args.minutes or float("inf"))
        with tqdm(total=sum(map(len, missing.values())), desc=self.name, unit="cell") as self.progress:
            for shape in self.shapes:
                self.measure_loop(shape, [cell for method, cell in missing[shape.name] if method == LOOP])
                for server in {json.dumps(policy.server): policy.server for policy in self.policies}.values():
                    own = {policy.label: policy for policy in self.policies if policy.server == server}
                    self.measure_engine(shape, server, [(own[m], cell) for m, cell in missing[shape.name] if m in own])
        if not self.rows:
            raise SystemExit(f"{self.name}: no minutes left for any cell")
        self.table().print()
        for path in self.table().write(self.args.results, plot):
            print(path)

    def missing(self, shape: Shape) -> list[tuple[str, Cell]]:
        """(method, cell), all methods of a cell before the next, so that what is compared is neighbours in time."""
        known = {(row["shape"], row["method"], row["prompt"], row["batch"]) for row in self.rows}
        only = self.args.only or [(cell.prompt, cell.batch) for cell in self.cells]
        cells = [cell for cell in self.cells if (cell.prompt, cell.batch) in only]
        singles = [] if self.args.no_loop else {cell.prompt: replace(cell, batch=1) for cell in cells}.values()
        wanted = [(LOOP, cell) for cell in singles]
        wanted += [(policy.label, cell) for cell in cells for policy in self.policies]
        return [(m, cell) for m, cell in wanted if (shape.name, m, cell.prompt, cell.batch) not in known]

    def measure_loop(self, shape: Shape, cells: list[Cell]) -> None:
        if not cells or self.late():
            return
        self.progress.set_postfix_str(f"{shape.name} loop")
        with self.load.watch() as watch:
            found = loop_seconds(shape, checkpoint(shape), cells, self.args)
        for cell, seconds in zip(cells, found, strict=True):
            self.keep(base_row(shape, LOOP, cell, seconds) | {"flops": cell.dense_flops(shape)} | watch.beside)

    def measure_engine(self, shape: Shape, server: dict, wanted: list[tuple[Policy, Cell]]) -> None:
        if not wanted or self.late():
            return
        engine = Engine(checkpoint(shape), shape, server, [cell for _, cell in wanted], self.args.threads)
        for policy, cell in wanted:
            if self.late():
                break
            self.progress.set_postfix_str(f"{shape.name} {policy.label} {cell.prompt} x {cell.batch}")
            timed = cell.short(self.args.none_steps) if self.args.none_steps and policy.label == "none" else cell
            with self.load.watch() as watch:
                runs = engine.measure(timed, policy.request, self.args.repetitions, self.args.seconds)
            self.keep(engine_row(shape, policy, timed, runs) | watch.beside)
        engine.close()

    def late(self) -> bool:
        return time.monotonic() > self.end

    def keep(self, row: dict) -> None:
        self.rows.append(row)
        self.table().write(self.args.results)
        self.progress.update()

    def table(self) -> report.Report:
        own = [(shape, [row for row in self.rows if row["shape"] == shape.name]) for shape in self.shapes]
        methods = [LOOP, *(policy.label for policy in self.policies)]
        rows = order(
            [row for _, rows in own for row in with_ratios(rows)],
            [shape.name for shape in self.shapes],
            self.cells,
            methods,
        )
        return report.Report(
            name=self.name, title=self.args.title,
            settings=self.settings | report.surroundings(self.args.threads, self.load, self.earlier),
            columns=COLUMNS, notes=NOTES + setting_notes(self.settings, self.cells), rows=rows,
        )  # fmt: skip


def settings(shapes, cells, policies, args) -> dict:
    return {
        "shapes": {shape.name: shape.describe() for shape in shapes},
        "weights": "random, normal(0, 0.02), seed 0",
        "dtype": "bfloat16",
        "decoding": {"name": "low_confidence", "block_length": BLOCK, "steps": "= new", "temperature": 0},
        "policies": {policy.label: {"server": policy.server, "request": policy.request} for policy in policies},
        "prompt_lengths": {f"{cell.prompt} x {cell.batch}": str(cell.lengths()) for cell in cells},
        "new": args.new,
        "repetitions": f"{args.repetitions}, fewer when a cell takes more than {args.seconds:g} s",
        "baseline": BASELINE,
        "counted": COUNTED,
        "threads_pinned": pinned(),
    }


def setting_notes(about: dict, cells: list[Cell]) -> list[str]:
    notes = [
        f"{name}: {shape['parameters'] / 1e6:.1f}M parameters, the head is "
        f"{shape['head_share_of_parameters']:.1%} of them (LLaDA-8B: 6.5%) and "
        f"{shape['head_share_of_dense_flops_at_512']:.1%} of the loop's FLOPs at 512 positions."
        for name, shape in about["shapes"].items()
    ]
    if any(cell.blocks * BLOCK < cell.new for cell in cells):
        notes.append(
            f"Timed and counted until the last request has block {cells[0].blocks} of its response; others may be "
            "in their next one by then. The rest is aborted."
        )
    return notes


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
        "cells": [{"prompt": cell.prompts(shape)[0], "new": cell.new, "blocks": cell.blocks} for cell in cells],
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
