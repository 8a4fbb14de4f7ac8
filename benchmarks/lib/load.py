"""Load of the machine: wait for an idle one before a measurement, and watch other processes during it.

The load average remembers a minute, so a benchmark would see its predecessor in it. The CPU time of other processes
is therefore measured as well: that of all cores less that of this process and its descendants.
"""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field

try:
    import psutil
except ImportError:  # kernels are measured on machines that have torch alone
    psutil = None

IDLE = 0.3  # cores used by other processes; a machine that needs more is not idle
PATIENCE = 300.0  # seconds


def load_average() -> float:
    """Processes that wanted a core during the last minute."""
    return round(os.getloadavg()[0], 2)


def busy_seconds() -> float:
    """CPU seconds of all cores so far. Time stolen by the host counts, waiting for disks does not."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def own_seconds() -> float:
    """CPU seconds of this process and its descendants, including children that have ended."""
    process, seconds = psutil.Process(), 0.0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended in the meantime
            times = each.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


class Watch:
    """`with Watch() as watch` sets `watch.others`: cores that other processes used on average, None if unknown."""

    others: float | None = None

    def __enter__(self) -> "Watch":
        self._begin = self._now()
        return self

    def __exit__(self, *_) -> None:
        if self._begin is not None:
            wall, busy, own = (now - before for now, before in zip(self._now(), self._begin, strict=True))
            self.others = max(0.0, round((busy - own) / wall, 3))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        return (time.perf_counter(), busy_seconds(), own_seconds()) if psutil else None


@dataclass
class Load:
    """Load `before` a table, at its end, and during each of its measurements (`others`)."""

    before: float = field(default_factory=load_average)
    waited: float = 0.0
    timed: bool = True  # False: the table contains no times
    others: list[float] = field(default_factory=list)

    def settings(self) -> dict:
        found: dict = {"average_before": self.before, "average_at_end": load_average()}
        found["waited_s"] = round(self.waited)
        if not self.timed:
            found["note"] = "nothing in this table is a time"
        if self.others:
            found["cores_used_by_others_at_most"] = max(self.others)
        return found

    def watch(self) -> "RecordingWatch":
        return RecordingWatch(self)


class RecordingWatch(Watch):
    """Adds what it saw to a `Load`."""

    def __init__(self, load: Load):
        self.load = load

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.others is not None:
            self.load.others.append(self.others)


def settle(busy: bool, patience: float, pause: float = 5.0) -> Load:
    """Waits until the machine is idle; an error after `patience` seconds. `busy`: measure immediately."""
    load = Load(load_average())
    begin, told = time.monotonic(), False
    while not busy and (now := load_average()) >= IDLE:
        load.waited = time.monotonic() - begin
        if load.waited >= patience:
            raise SystemExit(
                f"the machine is not idle: load average {now} after waiting {load.waited:.0f} s, idle is below {IDLE}; "
                "--busy measures anyway, and the tables say so"
            )
        if not told:
            print(f"waiting for an idle machine: load average {now}, idle is below {IDLE}", flush=True)
            told = True
        time.sleep(pause)
    if told:
        load.waited, load.before = time.monotonic() - begin, load_average()
        print(f"idle after {load.waited:.0f} s", flush=True)
    return load
