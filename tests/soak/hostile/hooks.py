"""Measures inside of the server's processes: how long each step of the engine takes, and memory after a settling.

vLLM loads it as a general plugin of a distribution that `environment` makes in a temporary folder; the served code is
unchanged. Read in vLLM 0.32: v1/engine/core.py (`EngineCoreProc`: `_process_engine_step`, `_handle_client_request`).
"""

import ctypes
import functools
import gc
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = "DLM_SOAK_FOLDER"
RECORD = struct.Struct("<dddd")
PAUSE = 0.2


@dataclass(frozen=True)
class Span:
    """Work on the engine's thread: a step, or the arrival of a request between two steps"""

    begin: float  # time.monotonic()
    seconds: float
    own: float  # seconds without those in which the thread was ready and had no core
    rows: float  # rows of the step; -1: no step ran


def environment(folder: Path, root: Path) -> dict[str, str]:
    """Variables of a server that loads the hooks and writes to `folder`; `root`: of this repository."""
    distribution = folder / "plugin" / "dlm_soak_hooks-0.dist-info"
    distribution.mkdir(parents=True)
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: dlm-soak-hooks\nVersion: 0\n")
    (distribution / "entry_points.txt").write_text(f"[vllm.general_plugins]\ndlm_soak_hooks = {__name__}:install\n")
    paths = [str(root), str(folder / "plugin"), os.environ.get("PYTHONPATH", "")]
    found = {FOLDER: str(folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if allowed := os.environ.get("VLLM_PLUGINS"):
        found["VLLM_PLUGINS"] = f"{allowed},dlm_soak_hooks"
    return found


def install() -> None:
    from vllm.v1.engine.core import EngineCoreProc

    from vllm_dlm.integration.scheduler.scheduler import DenoisingScheduler

    folder = Path(os.environ[FOLDER])
    threading.Thread(target=settle_when_told, args=(folder,), daemon=True).start()
    steps = os.open(folder / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    rows = [0]

    def timed(function, is_step: bool):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            begin, waited = time.monotonic(), waited_for_a_core()
            result = function(*args, **kwargs)
            if result or not is_step:  # else nothing was computed
                spent, waited = time.monotonic() - begin, waited_for_a_core() - waited
                os.write(steps, RECORD.pack(begin, spent, max(spent - waited, 0), rows[0] if is_step else -1))
            return result

        return wrapper

    def scheduled(schedule):
        @functools.wraps(schedule)
        def wrapper(*args, **kwargs):
            output = schedule(*args, **kwargs)
            rows[0] = output.total_num_scheduled_tokens
            return output

        return wrapper

    EngineCoreProc._process_engine_step = timed(EngineCoreProc._process_engine_step, True)
    EngineCoreProc._handle_client_request = timed(EngineCoreProc._handle_client_request, False)
    DenoisingScheduler.schedule = scheduled(DenoisingScheduler.schedule)


def waited_for_a_core(thread: str = "thread-self") -> float:
    """Seconds in which a thread was ready to run and other processes had the cores; 0 where the kernel does not say"""
    try:
        return int(Path(f"/proc/{thread}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def settle_when_told(folder: Path) -> None:
    """Collects garbage and returns free memory to the system whenever the number in the file `settle` changes."""
    settled = None
    while True:
        time.sleep(PAUSE)
        try:
            number = (folder / "settle").read_text()
        except OSError:
            continue
        if number != settled:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            settled = number
            (folder / f"settled-{os.getpid()}").write_text(number)


class Hooks:
    """The runner's side of the folder."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0

    def spans(self) -> list[Span]:
        file = self.folder / "steps"
        data = file.read_bytes() if file.exists() else b""
        whole = len(data) // RECORD.size * RECORD.size
        return [Span(*values) for values in RECORD.iter_unpack(data[:whole])]

    def settle(self, processes: list[int], patience: float = 60) -> bool:
        """Whether all of these processes have collected their garbage and trimmed their memory"""
        self.number += 1
        (self.folder / "settle").write_text(str(self.number))
        end = time.monotonic() + patience
        while not all(self._settled(process) for process in processes):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _settled(self, process: int) -> bool:
        file = self.folder / f"settled-{process}"
        return file.exists() and file.read_text() == str(self.number)
