"""Runs parts one after the other and writes each table whenever it has a new row.

A cell that fails is a row that says so, and the rest goes on. The same command with --resume continues.
"""

import importlib.util
import multiprocessing
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.lib import device, load, report
from benchmarks.lib.process import events
from benchmarks.lib.suite import Cell, Part, Plan, Table, planned


def run(options: Namespace) -> "Run | None":
    if options.toy and options.results == report.RESULTS:
        raise SystemExit("--toy: name a folder with --results; its results are not figures")
    if options.model and options.name not in ("speed", "pages"):
        raise SystemExit(f"--model: {options.name} does not take a checkpoint, `speed` and `pages` do")
    plan = planned(options.name, options)
    plan.parts = chosen(plan.parts, options.only)
    if options.plan:
        for part in plan.parts:
            print(f"{part.minutes:6.1f} min  {part.label}, {len(part.cells)} cells: {named(part.cells)}")
        where = "an H100" if options.device == "cuda" else "two idle cores"
        print(f"{sum(part.minutes for part in plan.parts):6.1f} min in all, on {where}")
        return None
    if options.device == "cuda" and device.device().type != "cuda" and not options.toy:
        raise SystemExit("torch finds no CUDA device here; --toy tries the run on a CPU")
    timed = any(plan.tables[part.table].timed for part in plan.parts)
    found = described(1.0 if timed and not options.toy else 0.1, options.in_process)
    options.peaks = device.peaks(found)
    made = Run(plan, options, found)
    made.run()
    return made


def described(seconds: float, in_process: bool) -> dict:
    """The device, from another process: memory that this process holds on it would be missing for engines."""
    if in_process:
        return device.describe(seconds)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(device.describe, seconds).result()


def chosen(parts: list[Part], only: list[str] | None) -> list[Part]:
    """Parts with one of the words in their labels, and of other parts the cells with one in their names"""
    if not only:
        return parts

    def wanted(text: str) -> bool:
        return any(word in text for word in only)

    parts = [p if wanted(p.label) else replace(p, cells=tuple(c for c in p.cells if wanted(c.name))) for p in parts]
    return [part for part in parts if part.cells]


def named(cells: tuple[Cell, ...], most: int = 8) -> str:
    return ", ".join(cell.name for cell in cells[:most]) + (", …" if len(cells) > most else "")


class Run:
    def __init__(self, plan: Plan, options: Namespace, found: dict):
        self.parts, self.options, self.device = plan.parts, options, found
        self.tables = {part.table: plan.tables[part.table] for part in plan.parts}
        self.threads = 1 if found["name"] != "CPU" else options.threads
        self.begin = time.monotonic()
        self.rows: dict[str, dict[str, dict]] = {table: {} for table in self.tables}
        self.earlier: dict[str, dict] = {}
        if options.resume:
            for table in self.tables:
                self.read(table)

    @property
    def busy(self) -> bool:
        """Rows of a busy machine are kept: by choice, or because a GPU does the work."""
        return self.options.busy or self.options.toy or self.options.device == "cuda"

    def read(self, table: str) -> None:
        busy = self.busy or not self.tables[table].timed
        old = report.resumed(self.path(table), self.settings(table), self.threads, busy)
        if old:
            self.rows[table] = {row["cell"]: row for row in old["rows"] if "cell" in row and "failed" not in row}
            self.earlier[table] = old["settings"]

    def path(self, table: str) -> Path:
        on_gpu = f"-{self.device['name'].lower().replace(' ', '-')}" if self.options.device == "cuda" else ""
        return self.options.results / f"{table}{on_gpu}{self.options.suffix}.json"

    def left(self) -> float:
        """Minutes"""
        return (self.options.minutes or float("inf")) - (time.monotonic() - self.begin) / 60

    def run(self) -> None:
        timed = any(self.tables[part.table].timed and self.missing(part) for part in self.parts)
        self.load = load.settle(self.busy or not timed, self.options.patience)
        try:
            for part in self.parts:
                self.measure(part)
        finally:  # an interrupted run gets its plots, too
            for table in self.tables:
                if self.rows[table]:
                    self.finish(table)
        missing = sum(len(self.missing(part)) for part in self.parts)
        rest = f"{missing} cells are not measured, the same command with --resume continues"
        print(f"{(time.monotonic() - self.begin) / 60:.0f} minutes; {rest if missing else 'everything is measured'}")
        if failed := [name for rows in self.rows.values() for name, row in rows.items() if "failed" in row]:
            print("failed: " + "; ".join(failed))

    @property
    def complete(self) -> bool:
        return not any(self.missing(part) for part in self.parts)

    def finish(self, table: str) -> None:
        found, plot = self.report(table), self.tables[table].plot
        if plot and importlib.util.find_spec("matplotlib") is None:
            print("no plot: matplotlib is missing; `python -m benchmarks redraw` draws it elsewhere")
            plot = None
        found.print()
        print("\n".join(map(str, found.write(self.options.results, plot))))

    def missing(self, part: Part) -> tuple[Cell, ...]:
        known = {name for name, row in self.rows[part.table].items() if "failed" not in row}
        return tuple(cell for cell in part.cells if cell.name not in known)

    def measure(self, part: Part) -> None:
        """A cell that fails takes its engine with it: the cells after it get a new one."""
        cells = self.missing(part)
        while cells:
            fitting = replace(part, cells=cells).fitting(self.left())
            if not fitting:
                print(f"no minutes left for {part.label}: {named(cells)}", flush=True)
                return
            blamed = self.follow(replace(part, cells=fitting))
            names = [cell.name for cell in cells]
            if blamed is not None and blamed not in names:
                return
            cells = cells[names.index(blamed) + 1 if blamed else len(fitting) :]

    def follow(self, part: Part) -> str | None:
        """Keeps the rows of the part -> the cell, or the part, that failed."""
        print(f"\n== {part.label}, about {part.minutes:.1f} minutes", flush=True)
        seconds = None if self.options.minutes is None else max(0.0, 60 * self.left())
        self.rows[part.table].pop(part.name, None)
        with ExitStack() as stack:
            watch = None
            for event in events(part, self.options, seconds):
                stack.close()
                if event.failed:
                    blamed = event.cell or part.name
                    self.keep(part, blamed, {"failed": f"{blamed}: {event.failed}"})
                    return blamed
                if event.row is None:
                    watch = stack.enter_context(self.load.watch())
                else:
                    others = {} if watch is None or watch.others is None else {"others": watch.others}
                    self.keep(part, event.cell, event.row | others)
        return None

    def keep(self, part: Part, name: str, row: dict) -> None:
        self.rows[part.table][name] = {"cell": name} | row
        short = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        print(f"{name}: {short}", flush=True)
        self.report(part.table).write(self.options.results)

    def settings(self, table: str) -> dict:
        """What rows must share to stand in one table"""
        return self.tables[table].settings | {"device": self.device["name"]}

    def report(self, name: str) -> report.Report:
        table: Table = self.tables[name]
        rows = table.finish([dict(row) for row in self.rows[name].values()])
        title = table.title + (f" on {self.device['name']}" if self.options.device == "cuda" else "")
        settings = self.settings(name) | report.surroundings(self.threads, self.load, self.earlier.get(name))
        if table.timed:
            settings |= {"peaks": {key: value for key, value in self.device.items() if key != "name"}}
        else:
            settings["load"] |= {"note": "nothing in this table is a time"}
        notes = [*table.bars(rows), *table.notes]
        if any("of_bound" in row for row in rows):
            notes.append(peaks_note(self.device))
        if left := sum(len(self.missing(part)) for part in self.parts if part.table == name):
            notes.append(f"{left} cells are missing; the same command with --resume measures them.")
        return report.Report(self.path(name).stem, title, settings, table.columns, notes, rows)


def peaks_note(found: dict) -> str:
    here, sheet = found["measured"], found.get("datasheet")
    reached = (
        f"reading {rate(here['read_bytes_per_s'], 'B/s')}, copying {rate(here['copy_bytes_per_s'], 'B/s')}, "
        f"bfloat16 products {rate(here['flops_per_s'], 'FLOP/s')}"
    )
    if not sheet:
        return f"Bounds use what is reached here: {reached}."
    stated = f"{rate(sheet['bytes_per_s'], 'B/s')} and {rate(sheet['flops_per_s'], 'FLOP/s')}"
    return f"Bounds use the datasheet's {stated}; reached here: {reached}."


def rate(per_second: float, unit: str) -> str:
    scale, letter = (1e12, "T") if per_second >= 1e12 else (1e9, "G")
    return f"{per_second / scale:.3g} {letter}{unit}"
