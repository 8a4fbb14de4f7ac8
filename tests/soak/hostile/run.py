"""Sends the table to one server, next to clients with known answers, and notes what each row did to the server.

A server that ends, or does not answer /health for BLOCKED seconds, is started again for the rest of the table; the row
is to blame.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tests.soak import served
from tests.soak.clients import Asked
from tests.soak.hostile import races
from tests.soak.hostile.good import GoodClients, known_requests
from tests.soak.hostile.health import Probe
from tests.soak.hostile.hooks import Span
from tests.soak.hostile.life import BLOCKED, MAX_MODEL_LEN, Life, RowResult, Server
from tests.soak.hostile.rows import Row, Target, table

BASELINE = 15  # seconds with these clients alone

HEALTH_MS, MEMORY_MIB, STEP_RATIO = 250, 32, 10  # the bars
ABOVE_CONTROL = 1.5


@dataclass
class Work:
    results: list[RowResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    baseline: dict = field(default_factory=dict)
    memory: list[dict] = field(default_factory=list)  # per server: process -> [MiB before, MiB after]
    memory_by_kind: list[dict] = field(default_factory=list)
    steps: list[Span] = field(default_factory=list)
    arrivals: list[Span] = field(default_factory=list)
    good: int = 0
    changed: list[str] = field(default_factory=list)
    races: int = 0
    race_problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    server_arguments: str = ""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    checkpoint: str
    dtype: str = "float32"
    seed: int = 0
    only: str = ""  # a regular expression for "kind: name" of a row
    races: int = 200
    large: int = 10 << 20  # bytes of an absurd body
    minutes: float = 0  # duration of the attack, after which no row is sent; 0: no limit


def run(plan: Plan, say: Callable = print) -> Work:
    work, begin = Work(), time.monotonic()
    config = json.loads((Path(plan.checkpoint) / "config.json").read_text())
    target = Target(MAX_MODEL_LEN, config["vocab_size"], config["mask_token_id"], seed=plan.seed, large=plan.large)
    rows = [row for row in table(target) if re.search(plan.only, f"{row.kind}: {row.name}")]
    known, left, end = list(known_requests()), rows, 0.0
    while left or not work.memory:
        with living(plan, target) as life:
            work.server_arguments = " ".join(life.server.command[life.server.command.index("--plugin") :])
            known = life.learn(known, say)
            life.warm()
            before = baseline(life, work, known, say)
            end = end or time.monotonic() + (60 * plan.minutes or float("inf"))
            with GoodClients(life.client, known) as good:
                left, fatal = send(life, work, good, left, end, say)
                if not left and not fatal:
                    fatal = hold_races(life, work, plan.races)
            work.good += len(good.ends)
            work.changed += [] if fatal else good.changed
            finish(life, work, before, fatal, say)
    work.seconds = time.monotonic() - begin
    return work


def send(
    life: Life, work: Work, good: GoodClients, rows: list[Row], end: float, say: Callable
) -> tuple[list[Row], bool]:
    """-> rows that are left, and whether the server ended"""
    for at, row in enumerate(rows):
        if time.monotonic() > end:
            work.problems.append(f"{len(rows) - at} rows were not sent: the time was over")
            return [], False
        result = life.attack(row, good)
        work.results.append(result)
        say(line_of(result, len(work.results)))
        if result.fatal:
            say(life.server.log_tail(15))
            return rows[at + 1 :], True
        if at + 1 == len(rows) or rows[at + 1].kind != row.kind:
            work.memory_by_kind.append({"kind": row.kind} | life.settled())
    return [], False


@contextmanager
def living(plan: Plan, target: Target) -> Iterator[Life]:
    with TemporaryDirectory() as place:
        folder = Path(place)
        with Server(plan.checkpoint, plan.dtype, folder, folder / "log") as server:
            server.wait(300)
            life = Life(server, folder, target, plan.checkpoint)
            with life.health:
                yield life


def baseline(life: Life, work: Work, known: list[Asked], say) -> dict[str, float]:
    """Good clients alone: what /health and steps take without an attack. -> memory before it, with nothing running"""
    with GoodClients(life.client, known) as good:
        begin = time.monotonic()
        time.sleep(BASELINE)
    probes = life.health.since(begin, time.monotonic(), BLOCKED)
    spans = [span for span in life.hooks.spans() if span.begin >= begin]
    if not work.baseline:
        work.baseline = summary(probes, spans) | {"seconds": BASELINE, "good_answers": len(good.ends)}
        say(f"baseline: {work.baseline}")
    if busy := life.quiet():
        work.problems.append(busy)
    return life.settled()


def summary(probes: list[Probe], spans: list[Span]) -> dict:
    seconds = sorted(probe.seconds for probe in probes) or [0.0]
    steps = [span.own for span in spans if span.rows >= 0] or [0.0]
    return {
        "probes": len(probes),
        "health_ms_median": round(1e3 * median(seconds), 2),
        "health_ms_p99": round(1e3 * seconds[int(0.99 * (len(seconds) - 1))], 1),
        "health_ms_worst": round(1e3 * seconds[-1], 1),
        "prober_late_ms_worst": round(1e3 * max((probe.late for probe in probes), default=0), 1),
        "step_ms_median": round(1e3 * median(steps), 2),
        "step_ms_longest": round(1e3 * max(steps), 2),
    }


def hold_races(life: Life, work: Work, count: int) -> bool:
    """Whether the server ended with it"""
    for number in range(count):
        work.races += 1
        work.race_problems += races.race(life.wire, life.target, number)
        if not served.alive(life.server, life.client):
            work.race_problems.append(f"race {number} ended the server")
            return True
    return False


def finish(life: Life, work: Work, before: dict[str, float], fatal: bool, say) -> None:
    spans = life.hooks.spans()
    work.steps += [span for span in spans if span.rows >= 0]
    work.arrivals += [span for span in spans if span.rows < 0]
    after: dict[str, float] = {}
    if not fatal:
        if busy := life.quiet():
            work.problems.append(busy)
        after = life.settled()
    work.memory.append({process: [mib, after.get(process)] for process, mib in before.items()})
    say(f"resident memory, before and after: {work.memory[-1]}")


def line_of(result: RowResult, at: int) -> str:
    answers = ", ".join(f"{count} x {status or 'left'}" for status, count in result.answers.items())
    figures = f"health {result.health_ms:.0f} ms, step {result.step_ms:.0f} ms, {result.seconds:.1f} s"
    return f"{at}. {result.row.kind}: {result.row.name}: {answers}; {figures} {'; '.join(result.problems)}"[:400]
