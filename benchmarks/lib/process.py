"""A part in its own process: what it reports while it runs, and what remains if it fails."""

import importlib.util
import multiprocessing
import os
import re
import time
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.lib.suite import Part, module_of

#: seconds after which a silent process is given up
SILENCE = 15 * 60.0
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the part's own process, where its steps can be observed
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


#: engines of a run in one process: shutting one down would end torch.distributed for the others
KEPT: list = []


class Event(NamedTuple):
    """A cell begins, has its row, or failed. cell None: the part failed outside of any cell."""

    cell: str | None
    row: dict | None = None
    failed: str | None = None


def cores(threads: int) -> list[int]:
    return sorted(os.sched_getaffinity(0))[:threads]


def pinned() -> bool:
    """Two engines pinned to the same cores slow each other down manifold; VLLM_CPU_OMP_THREADS_BIND=nobind prevents
    it."""
    return os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind"


def engine_environment(threads: int) -> dict[str, str]:
    # By default vLLM keeps a core for its scheduler, half of a machine with two.
    if pinned():
        return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores(threads)))}
    return {"OMP_NUM_THREADS": str(threads)}


def loop_environment(threads: int) -> dict[str, str]:
    """What vLLM gives its worker: torch's own OpenMP, one thread bound to each core."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    preload = [os.environ.get("LD_PRELOAD"), str(library) if library.exists() else None]
    affinity = {"GOMP_CPU_AFFINITY": " ".join(map(str, cores(threads)))} if pinned() else {}
    return affinity | {"OMP_NUM_THREADS": str(threads), "LD_PRELOAD": ":".join(filter(None, preload))}


@contextmanager
def environment_of(part: Part, options: Namespace) -> Iterator[None]:
    """A spawned process inherits it, before torch reads it."""
    before = dict(os.environ)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if options.device == "cpu":
        os.environ.update(dict(part.environment) or engine_environment(options.threads))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def events(part: Part, options: Namespace, seconds: float | None) -> Iterator[Event]:
    """As they happen. After `seconds` the process is killed; what it has sent is kept."""
    if part.vllm and importlib.util.find_spec("vllm") is None:
        yield Event(None, failed="vLLM is not installed")
        return
    if options.in_process:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        yield from own_events(part, options)
        return
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=child, args=(theirs, part, options))
    with environment_of(part, options):
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
                yield Event(cell, failed=f"no sign of life for {SILENCE // 60:.0f} minutes")
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


def child(pipe, part: Part, options: Namespace) -> None:
    for event in own_events(part, options):
        pipe.send(event)
    pipe.send(None)
    pipe.close()
    os._exit(0)  # shutting an engine down takes longer than ending its process


def own_events(part: Part, options: Namespace) -> Iterator[Event]:
    cell = None
    try:
        if options.device == "cpu" and not options.in_process:
            import torch

            torch.set_num_threads(options.threads)
        measure = module_of(part.suite).opened(part, options)
        if options.in_process:
            KEPT.append(measure)
        for cell in part.cells:
            yield Event(cell.name)
            yield Event(cell.name, measure(cell.work))
            cell = None
    except Exception as error:
        traceback.print_exc()  # the table has room for one line
        yield Event(cell and cell.name, failed=one_line(error))


def one_line(error: BaseException) -> str:
    return shortened(f"{type(error).__name__}: {error}", 160)


def shortened(text: str, most: int) -> str:
    """One line, with files named without their folders"""
    return re.sub(r"(/[\w.+-]+)+/", "", " ".join(text.split()))[:most].rstrip(": ")
