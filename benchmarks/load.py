"""Who else wants the cores: waiting for an idle machine before a measurement, and watching it meanwhile.

The load average is the usual word for it, but it remembers a minute: a
benchmark that follows another one sees its predecessor. So the time that
others took is counted as well, from /proc: what all cores did less what this
process and its descendants did.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

IDLE = 0.3  # cores wanted by others; above it a machine is not idle
PATIENCE = 300.0  # seconds to wait for that
#: set by a run of several benchmarks for those it starts: the load average before its first one
RUN_LOAD = "DLM_BENCHMARKS_RUN_LOAD"


def load_average() -> float:
    """Processes wanting a core in the last minute."""
    return round(os.getloadavg()[0], 2)


def busy_seconds(stat: str) -> float:
    """Of all cores so far, from /proc/stat: all but idle and waiting for disks; what a host takes counts."""
    user, nice, system, _idle, _iowait, interrupts, soft, stolen = map(int, stat.split("\n")[0].split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def own_seconds(root: int, proc: Path = Path("/proc")) -> float:
    """Of the process `root`, its descendants, and those of them that have ended and were waited for."""
    parents, ticks = {}, {}
    for folder in proc.glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        ticks[int(folder.name)] = sum(map(int, fields[11:15]))

    def descends(process: int) -> bool:
        while process and process != root:
            process = parents.get(process, 0)
        return process == root

    return sum(own for process, own in ticks.items() if descends(process)) / os.sysconf("SC_CLK_TCK")


class Watch:
    """`with Watch() as watch: …` -> `watch.others`, the cores others used on average; None without /proc."""

    others: float | None = None

    def __enter__(self) -> "Watch":
        self._begin = self._now()
        return self

    def __exit__(self, *_) -> None:
        if self._begin is not None:
            (wall, busy, own), (before, busy_before, own_before) = self._now(), self._begin
            self.others = max(0.0, round((busy - busy_before - own + own_before) / (wall - before), 3))

    def _now(self) -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        return time.perf_counter(), busy_seconds(stat.read_text()), own_seconds(os.getpid())


def others_now(seconds: float) -> float | None:
    with Watch() as watch:
        time.sleep(seconds)
    return watch.others


@dataclass
class Load:
    """The machine around one table: `before` it, at the `end`, and in between (`others`, per measurement)."""

    before: float = field(default_factory=load_average)
    waited: float = 0.0
    within_run: bool = False  # `before` is that of the run this table belongs to
    timed: bool = True  # False: the table has no times, and the load is told for completeness
    others: list[float] = field(default_factory=list)

    def settings(self) -> dict:
        found = {
            "average_before": self.before,
            "average_at_end": load_average(),
            "waited_s": round(self.waited),
        }
        if self.within_run:
            found["average_before_is_of"] = "the whole run, which measured other tables before this one"
        if not self.timed:
            found["note"] = "nothing in this table is a time"
        if self.others:
            found["cores_used_by_others_at_most"] = max(self.others)
        return found

    def watch(self) -> "Noted":
        return Noted(self)


class Noted(Watch):
    def __init__(self, load: Load):
        self.load = load

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.others is not None:
            self.load.others.append(self.others)

    @property
    def beside(self) -> dict:
        """For the row that was measured: whoever quotes it asks whether the machine was idle for this one."""
        return {} if self.others is None else {"others": self.others}


def add_arguments(parser) -> None:
    parser.add_argument(
        "--busy", action="store_true", help="measure although the machine is not idle; the table says so"
    )
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, metavar="S",
        help=f"seconds to wait for a load average below {IDLE} (default {PATIENCE:g})",
    )  # fmt: skip


def settle(busy: bool, patience: float, pause: float = 5.0) -> Load:
    """Waits until nobody else wants the cores, and says so; an error after `patience` seconds."""
    of_run = os.environ.get(RUN_LOAD)
    load = Load(float(of_run) if of_run else load_average(), within_run=of_run is not None)
    if busy:
        return load

    def wanted() -> float:
        # Within a run the average is that of the run itself.
        return (others_now(pause) or 0.0) if load.within_run else load_average()

    begin, said = time.monotonic(), False
    while (now := wanted()) >= IDLE:
        load.waited = time.monotonic() - begin
        if load.waited >= patience:
            raise SystemExit(
                f"the machine is not idle: {now} cores wanted after waiting {load.waited:.0f} s, "
                f"below {IDLE} is idle; --busy measures all the same, and the tables say so"
            )
        if not said:
            print(
                f"waiting for an idle machine: {now} cores wanted, below {IDLE} is idle, {patience:g} s at most",
                flush=True,
            )
            said = True
        time.sleep(pause)
    if said:
        load.waited = time.monotonic() - begin
        print(f"idle after {load.waited:.0f} s", flush=True)
    if not load.within_run:
        load.before = load_average()
    return load
