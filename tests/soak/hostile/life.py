"""One server of a run: what is measured of it from outside and inside, and a row that is sent to it."""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak import memory, served
from tests.soak.clients import Asked, Client
from tests.soak.hostile import acts, fields, hooks
from tests.soak.hostile.acts import Outcome, Wire
from tests.soak.hostile.good import GoodClients
from tests.soak.hostile.health import Health
from tests.soak.hostile.hooks import Hooks, Span
from tests.soak.hostile.rows import AT_ONCE, Row, Target, completion, posted
from vllm_dlm.demo import server as demo

ROOT = Path(__file__).resolve().parents[3]
MAX_MODEL_LEN = 1024
LENGTHS = 96  # different canvases before memory is measured: more than products that oneDNN keeps
SECONDS, SECONDS_PER_CLIENT = 8, 0.3  # that a row's clients wait for their answers
FIRST = 1000  # number of the first hostile request; those of the warm-up are negative
BLOCKED = 60  # seconds without /health after which a server is given up
QUIET = 120  # seconds in which a server must be idle after its clients have gone


class Server(demo.Server):
    """Room for a few canvases, so that requests also wait."""

    def __init__(self, checkpoint: str, dtype: str, folder: Path, log: Path):
        super().__init__(
            *("--plugin", "vllm_dlm", "--dlm-view", "--served-model-name", demo.MODEL, "--dtype", dtype),
            *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16", "--max-num-batched-tokens", "2048"),
            *("--kv-cache-memory-bytes", str(64 << 20)),
            checkpoint=checkpoint,
            log=log,
            environment=demo.ENVIRONMENT | os.environ | served.SERVED | hooks.environment(folder, ROOT),
        )


@dataclass
class RowResult:
    """What a row was answered, and what the server did meanwhile."""

    row: Row
    answers: Counter = field(default_factory=Counter)  # status -> how many
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    size: int = 0  # bytes of one body
    health_ms: float = 0.0
    late_ms: float = 0.0  # how late the prober itself was woken
    waited_ms: float = 0.0  # how long the front-end's main thread had no core
    step_ms: float = 0.0
    step_own_ms: float = 0.0  # without waiting for a core
    arrival_ms: float = 0.0
    good: int = 0  # answers of the clients with known answers that came meanwhile
    mib: dict[str, float] = field(default_factory=dict)  # per process, after the row
    fatal: bool = False


class Life:
    """One server with its prober and its measurements."""

    def __init__(self, server: Server, folder: Path, target: Target, checkpoint: str):
        self.server, self.target = server, target
        self.wire = Wire(demo.HOST, server.port)
        config = json.loads((Path(checkpoint) / "config.json").read_text())
        self.client = Client(demo.HOST, server.port, MAX_MODEL_LEN, config["vocab_size"], config["mask_token_id"])
        self.hooks, self.health = Hooks(folder), Health(demo.HOST, server.port, folder)
        self.number = FIRST

    def learn(self, known: list[Asked], say) -> list[Asked]:
        """Answers of a server that nobody has attacked; later servers must give those of the first."""
        learnt = []
        for asked in known:
            status, answer = self.client.ask(asked)
            if status == 200 and asked.answer in ([], answer):
                asked.answer = answer
                learnt.append(asked)
            elif status == 200:
                say(f"another server answers {asked.body} otherwise")
        return learnt

    def warm(self) -> None:
        """What every server does once: small and large legal requests, and bodies as large as the absurd ones."""
        deadline = time.monotonic() + 120

        def lengths(target: Target, number: int):
            length = 1 + number * 37 % target.room
            return completion(extra=AT_ONCE, max_tokens=length)(target, number)

        small = [Row("warm", "", completion(max_tokens=length), clients=8) for length in (1, 16, 64, 256)]
        small += [Row("warm", "", lengths, clients=8) for _ in range(LENGTHS // 8)]
        large = [
            *(row for row in fields.controls(self.target)),
            Row("warm", "", completion(extra={"dlm_frames": 1}, stream=True, max_tokens=16), clients=16),
            Row("warm", "", score, clients=8),
        ]
        for number, row in enumerate(small + large):
            numbers = range(-100 * (number + 1), -100 * (number + 1) + row.clients)
            acts.ask(self.wire, self.target, row, numbers, deadline)

    def resident(self) -> dict[str, float]:
        """process -> MiB"""
        samples = memory.sample(self.server.process.pid, 0, 0.0)
        return {each.process: each.rss_kib / 1024 for each in samples if hooked(each.process)}

    def settled(self) -> dict[str, float]:
        """The same once garbage was collected and free memory returned to the system; the least of a few moments"""
        samples = memory.sample(self.server.process.pid, 0, 0.0)
        pids = [each.pid for each in samples if hooked(each.process)]
        least: dict[str, float] = {}
        for _ in range(3):
            self.hooks.settle(pids)
            for process, mib in self.resident().items():
                least[process] = min(mib, least.get(process, mib))
            time.sleep(0.3)
        return least

    def quiet(self) -> str | None:
        """Waits until nothing runs; what is still there after QUIET seconds"""
        end = time.monotonic() + QUIET
        while True:
            values = served.metrics(self.client)
            busy = {
                name: values[f"vllm:{name}"]
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
                if values[f"vllm:{name}"]
            }
            if not busy:
                return None
            if time.monotonic() > end:
                return f"{QUIET} s after the last client there is still {busy}"
            time.sleep(0.2)

    def attack(self, row: Row, good: GoodClients) -> RowResult:
        numbers = range(self.number, self.number + row.clients)
        self.number = numbers.stop
        result = RowResult(row, size=len(acts.message_of(row, self.target, numbers.start).body))
        begin, waited = time.monotonic(), hooks.waited_for_a_core(str(self.server.process.pid))
        deadline = begin + SECONDS + SECONDS_PER_CLIENT * row.clients
        outcomes = acts.ACTS[row.act](self.wire, self.target, row, numbers, deadline)
        end = time.monotonic()
        probes = self.health.since(begin, end, BLOCKED)
        result.seconds = end - begin
        result.waited_ms = 1e3 * max(hooks.waited_for_a_core(str(self.server.process.pid)) - waited, 0)
        result.health_ms = 1e3 * max((probe.seconds for probe in probes), default=0)
        result.late_ms = 1e3 * max((probe.late for probe in probes), default=0)
        for name, milliseconds in worst_of([s for s in self.hooks.spans() if begin <= s.begin <= end]).items():
            setattr(result, name, milliseconds)
        result.good = good.between(begin, end)
        judge(result, outcomes)
        result.mib = self.resident()
        if not served.alive(self.server, self.client) or (probes and not probes[-1].status):
            result.fatal = True
            result.problems.append("the server ended" if self.server.process.poll() is not None else "it is blocked")
        return result


def score(target: Target, number: int):
    return posted("/v1/dlm/score", {"context": f"Copy: {number}", "continuation": [" a", " b"], "mc_num": 16})


def hooked(process: str) -> bool:
    return process.startswith(("front-end", "engine"))


def worst_of(spans: list[Span]) -> dict[str, float]:
    steps, arrivals = ([s for s in spans if (s.rows >= 0) == is_step] for is_step in (True, False))
    return {
        "step_ms": 1e3 * max((span.seconds for span in steps), default=0),
        "step_own_ms": 1e3 * max((span.own for span in steps), default=0),
        "arrival_ms": 1e3 * max((span.own for span in arrivals), default=0),
    }


def judge(result: RowResult, outcomes: list[Outcome]) -> None:
    """Statuses that the row does not expect, and answers that did not come"""
    row = result.row
    result.answers = Counter(outcome.status for outcome in outcomes)
    for status, count in result.answers.items():
        details = next((each.problem for each in outcomes if each.status == status and each.problem), "")
        if status is None:
            if row.act == "ask" and not row.long:
                result.problems.append(f"{count} had no answer within {SECONDS} s {details}".strip())
        elif status not in row.expected:
            wanted = " or ".join(map(str, sorted(row.expected)))
            result.problems.append(f"{count} answered {status}, expected {wanted} {details}".strip())
