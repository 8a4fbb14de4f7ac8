"""Runs a function in a copy of this process, so that whatever it breaks, a native crash or a loop without end
included, stays there: engines of the parent are as they were.

A copy has none of the parent's threads, so the parent must compute with one (OMP_NUM_THREADS=1).
"""

import os
import pickle
import select
import signal
import time
import traceback


class Found(Exception):
    """A defect. `kind` tells defects apart while a failing batch is made smaller."""

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def in_a_fork(function, *args, seconds: float = 3600):
    """What the function returns; what it raises is raised here, as Found if it is not yet."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        _child(write, function, args)
    os.close(write)
    try:
        data = _read_all(read, time.monotonic() + seconds)
        if data is None:
            raise Found("hang", f"no end after {seconds:.0f} s")
    finally:
        os.close(read)
        if data is None:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if not data:
        raise Found("death", f"the process ended with status {status}")
    result, error = pickle.loads(data)
    if error is not None:
        raise error
    return result


def _child(write: int, function, args) -> None:
    try:
        try:
            answer = function(*args), None
        except Found as found:
            answer = None, found
        except BaseException as error:
            answer = None, Found(f"exception {type(error).__name__}", traceback.format_exc(limit=-6))
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(answer, pipe)
    finally:
        os._exit(0)


def _read_all(read: int, deadline: float) -> bytes | None:
    parts = []
    while True:
        ready, _, _ = select.select([read], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(read, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
