"""What a suite is made of.

A suite is a module in benchmarks/suites with three functions:

    tables(options) -> {file stem: Table}
    parts(options)  -> [Part]           what `--device`, `--model` and `--toy` leave to measure
    opened(part, options) -> measure    starts the engine of a part; `measure(cell.work)` gives the row of a cell

and optionally `add_arguments(parser)`. `options` is the parsed command line with `peaks`, the device's Peaks.
"""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.lib.report import Column

#: in the order in which they are listed
SUITES = {
    "correctness": "kernels against their definitions, replayed against launched steps, and tests on this device",
    "speed": "tokens per second per policy, against the published loop, other policies and the bound of a step",
    "kernels": "page-sparse attention of one decoding step against dense kernels; runs without vLLM",
    "pages": "a decoding step at long context, pages chosen by UNIQUE against dense vLLM",
    "rules": "decodings that fill several tokens per step, windows and drafts, on texts of the demo checkpoint",
    "blocks": "LLaDA2 and SDAR against their published loops, and prompts found in the prefix cache",
    "quality": "answers and drift from the exact model under every reuse policy, on the demo checkpoint",
    "answers": "answers under every decoding, reuse and extent, on short and long canvases",
    "selection": "answers and attention kept by selections and other rules, on the demo checkpoint",
    "real": "loss that page selections add to continuations of real text, on a small real model",
    "weights": "quantized weights against bfloat16 ones",
    "costs": "multiply-adds of the policies on LLaDA-8B and Dream-7B, by the cost model",
    "view": "what the live view costs, watched or not",
    "memory": "peak memory of a training step through page masks",
}


@dataclass(frozen=True)
class Cell:
    """One row"""

    name: str  # unique within its table
    minutes: float  # estimate: on an H100, or on two CPU cores
    work: Any = None


@dataclass(frozen=True)
class Part:
    """Cells that share an engine and a process"""

    suite: str
    table: str  # stem of the result files
    name: str
    cells: tuple[Cell, ...]
    start: float = 0.2  # minutes before the first cell
    engine: Any = None
    rank: int | None = None  # `all` runs the parts of low rank first, and none without a rank
    vllm: bool = True  # False: it runs without vLLM
    environment: tuple[tuple[str, str], ...] = ()  # environment variables of its process

    @property
    def minutes(self) -> float:
        return self.start + sum(cell.minutes for cell in self.cells)

    @property
    def label(self) -> str:
        return f"{self.table}: {self.name}"

    def fitting(self, minutes: float) -> tuple[Cell, ...]:
        """The first cells that are done by then"""
        cells, used = [], self.start
        for cell in self.cells:
            used += cell.minutes
            if used > minutes:
                break
            cells.append(cell)
        return tuple(cells)


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[Column]
    notes: list[str]
    settings: dict  # shapes, dtype, baseline, counted, and what else a reader needs
    finish: Callable[[list[dict]], list[dict]] = lambda rows: rows  # ratios and order
    bars: Callable[[list[dict]], list[str]] = lambda rows: []  # goals, and what was found
    plot: Callable | None = None  # (figure, rows)
    timed: bool = True  # False: no times in it, so the machine may be busy


@dataclass
class Plan:
    parts: list[Part] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)


def module_of(suite: str):
    return importlib.import_module(f"benchmarks.suites.{suite}")


def planned(name: str, options: argparse.Namespace) -> Plan:
    """The parts of one suite, or for `all` the ranked parts in order of rank"""
    if name != "all":
        module = module_of(name)
        return Plan(module.parts(options), module.tables(options))
    plan = Plan()
    for suite in ("correctness", "speed", "kernels", "pages", "rules"):
        module = module_of(suite)
        plan.parts += [part for part in module.parts(options) if part.rank is not None]
        plan.tables |= module.tables(options)
    plan.parts.sort(key=lambda part: part.rank)
    return plan


def parser() -> argparse.ArgumentParser:
    """With the arguments of all suites"""
    import os
    from pathlib import Path

    from benchmarks.lib.load import IDLE, PATIENCE
    from benchmarks.lib.report import RESULTS

    suites = "\n".join(f"  {name:12} {text}" for name, text in SUITES.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Measure vllm_dlm.\n\n{suites}\n"
        "  all          the most telling cells first: on a CPU the figures that README and docs/results.md quote,\n"
        "               on a GPU everything that a GPU can tell\n"
        "  redraw       tables, plots and quoting pages again, from the JSON files",
    )
    add, cores = made.add_argument, len(os.sched_getaffinity(0))
    add("name", choices=[*SUITES, "all", "redraw"], metavar="NAME")
    add("names", nargs="*", help="of `redraw`: results; default all")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--model", type=Path, help="of `speed` and `pages`: a real checkpoint instead of random weights")
    add("--toy", action="store_true", help="toy models on a CPU; needs --results")
    add("--minutes", type=float, help="begin no cell that would take longer, and end then")
    add("--plan", action="store_true", help="print what there is to do and how long it takes")
    add("--only", action="append", metavar="WORD", help="parts or cells with it in their names; repeatable")
    add("--resume", action="store_true", help="keep the rows of the result files, except failures")
    add("--in-process", action="store_true", help="everything in this process, where one crash ends the run")
    add("--threads", type=int, default=cores, help=f"of a CPU (default {cores})")
    add("--busy", action="store_true", help="measure on a machine that is not idle; the tables say so")
    add("--patience", type=float, default=PATIENCE, metavar="S", help=f"seconds to wait for a load below {IDLE}")
    add("--suffix", default="", help="of the names of the result files")
    add("--results", type=Path, default=RESULTS)
    for suite in SUITES:
        group = made.add_argument_group(suite)
        if hasattr(module := module_of(suite), "add_arguments"):
            module.add_arguments(group)
    return made
