"""Parts of a run on a GPU: what each measures with one engine, in a process of its own, and what is left of it when
it fails."""

import importlib
import importlib.util
import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks.gpu_shapes import Peaks

#: table -> who measures it: `opened(part, peaks)` starts what all cells need and gives a function, cell -> row
TABLES = {
    "correctness": "benchmarks.gpu_correctness", "kernels": "benchmarks.gpu_kernels",
    "denoising": "benchmarks.gpu_denoising", "rules": "benchmarks.gpu_rules", "pages": "benchmarks.gpu_pages",
}  # fmt: skip

#: seconds after which a process that says nothing is given up
SILENCE = 15 * 60.0

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the part's own process, where it can be looked into
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Cell:
    name: str  # once in its table
    minutes: float  # about, on an H100
    what: Any  # for the table's module


@dataclass(frozen=True)
class Part:
    table: str
    name: str
    start: float  # minutes before its first cell
    cells: tuple[Cell, ...]
    engine: Any = None  # for the table's module
    vllm: bool = True  # it needs one
    about: dict = field(default_factory=dict)  # stands in the row of a failure

    @property
    def minutes(self) -> float:
        return self.start + sum(cell.minutes for cell in self.cells)

    def fitting(self, minutes: float) -> "tuple[Cell, ...]":
        """The cells, in order, that are through by then."""
        cells, used = [], self.start
        for cell in self.cells:
            used += cell.minutes
            if used > minutes:
                break
            cells.append(cell)
        return tuple(cells)


class Event(NamedTuple):
    """A cell begins; its row; or that it failed (cell None: the part, before a cell or between two)."""

    cell: str | None
    row: dict | None = None
    failed: str | None = None


def module_of(table: str):
    return importlib.import_module(TABLES[table])


def events(part: Part, peaks: Peaks, seconds: float | None, in_process: bool) -> Iterator[Event]:
    """What happens, as it happens; after so many seconds the process is ended, and what it has sent is kept."""
    if part.vllm and importlib.util.find_spec("vllm") is None:
        yield Event(None, failed="vLLM is not installed")
        return
    if in_process:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        yield from own_events(part, peaks)
        return
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=child, args=(theirs, part, peaks))
    process.start()
    theirs.close()
    try:
        yield from received(ours, process, seconds)
    finally:
        process.kill()
        process.join()


def received(pipe, process, seconds: float | None) -> Iterator[Event]:
    end, cell = None if seconds is None else time.monotonic() + seconds, None
    while True:
        left = SILENCE if end is None else end - time.monotonic()
        if not pipe.poll(max(0.0, min(left, SILENCE))):
            if left >= SILENCE:
                yield Event(cell, failed=f"nothing was heard of it for {SILENCE // 60:.0f} minutes")
            else:
                print("ended: no minutes left", flush=True)
            return
        try:
            event = pipe.recv()
        except EOFError:
            process.join()
            yield Event(cell, failed=f"its process ended with {process.exitcode}")
            return
        if event is None:
            return
        cell = event.cell if event.row is None else None
        yield event
        if event.failed:
            return


def child(pipe, part: Part, peaks: Peaks) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for event in own_events(part, peaks):
        pipe.send(event)
    pipe.send(None)
    pipe.close()
    os._exit(0)  # taking an engine down takes longer than the end of its process


def own_events(part: Part, peaks: Peaks) -> Iterator[Event]:
    cell = None
    try:
        measure = module_of(part.table).opened(part, peaks)
        for cell in part.cells:
            yield Event(cell.name)
            yield Event(cell.name, measure(cell))
            cell = None
    except Exception as error:
        traceback.print_exc()  # the table has room for a line
        yield Event(cell and cell.name, failed=one_line(error))


def one_line(error: BaseException) -> str:
    return shortened(f"{type(error).__name__}: {error}", 160)


def shortened(text: str, most: int) -> str:
    """One line, and files without their folders"""
    return re.sub(r"(/[\w.+-]+)+/", "", " ".join(text.split()))[:most].rstrip(": ")
