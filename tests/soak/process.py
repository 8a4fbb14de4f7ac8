"""The long run in one process: shift after shift, each with engines of its own, batch after batch until enough
requests were served or a batch fails; a failing one is made small and printed as Python that shows it again.
"""

import contextlib
import random
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.soak.batch import Batch, Entry, check
from tests.soak.engines import Pair, Server
from tests.soak.fork import Found, in_a_fork
from tests.soak.requests import Given, drawn_request, drawn_server
from tests.soak.shrink import shrink
from vllm_dlm.methods import methods
from vllm_dlm.options import OptionError, request_options

CHECKPOINTS = Path(__file__).resolve().parents[2] / "tests/golden/checkpoints"
#: requests of a batch that were asked before: their answer alone is known
REPEATED = 0.7
#: one in so many requests is aborted, if it is still going by then
LEAVES_EVERY = 10


def complete_checkpoints() -> list[str]:
    """Those with a tokenizer, which stop strings need"""
    return sorted(str(path.parent) for path in CHECKPOINTS.glob("*/tokenizer_config.json"))


@dataclass
class Shift:
    """What one pair of engines did."""

    server: Server
    requests: int = 0
    batches: int = 0
    distinct: int = 0
    compared: int = 0
    aborted: int = 0
    restarted: int = 0
    steps: int = 0
    seconds: float = 0.0
    refused: Counter = field(default_factory=Counter)  # by field
    covered: Counter = field(default_factory=Counter)  # decoding, reuse, selection


@dataclass
class Failure:
    server: Server
    batch: Batch
    found: Found
    tried: int  # smaller batches

    def python(self) -> str:
        return "\n".join(
            [
                "from tests.soak.batch import Batch, Entry",
                "from tests.soak.engines import Server",
                "from tests.soak.process import replay",
                "from tests.soak.requests import Given",
                f"replay({self.server!r}, {self.batch!r})",
            ]
        )


def servers(seed: int, dtype: str, checkpoints: list[str]):
    """First every checkpoint as it is served by default, then random options around every selection in turn."""
    for checkpoint in checkpoints:
        yield Server(checkpoint, dtype)
    rng = random.Random(f"servers {seed}")
    chosen = sorted(methods("selection"), key=lambda name: not methods("selection")[name].sparse)
    index = 0
    while True:
        checkpoint, selection = checkpoints[index % len(checkpoints)], chosen[index % len(chosen)]
        if index % len(checkpoints) == 0:
            rng.shuffle(chosen)
        yield Server(checkpoint, dtype, drawn_server(rng, "low_confidence", selection))
        index += 1


def soak(requests: int, seed: int, dtype: str, checkpoints: list[str], shift: int, say=print):
    """-> (what was done, the failure that ended it or None)"""
    done: list[Shift] = []
    for number, server in enumerate(servers(seed, dtype, checkpoints)):
        served = sum(each.requests for each in done)
        if served >= requests:
            return done, None
        wanted = min(shift, requests - served)
        work, failure = in_a_fork(work_shift, server, f"{seed}/{number}", wanted)
        done.append(work)
        say(f"{served + work.requests} of {requests} requests, {server.label} {server.dlm}: {work.seconds:.0f} s")
        if failure:
            return done, failure


def work_shift(server: Server, seed: str, requests: int) -> tuple[Shift, Failure | None]:
    pair = Pair(server).started()
    batch, found, work = in_a_fork(serve, pair, seed, requests, seconds=7200)
    if found is None:
        return work, None
    return work, Failure(server, *smallest(pair, batch, found))


def serve(pair: Pair, seed: str, requests: int):
    """-> (failing batch, how it failed, what was done): the first two are None if all went well"""
    work, known, pool = Shift(pair.server), {}, []
    begin = time.monotonic()
    while work.requests < requests:
        rng = random.Random(f"{seed}/{work.batches}")
        batch = drawn_batch(rng, pair, pool, work, requests - work.requests)
        try:
            ran = check(pair, batch, known)
        except BaseException as error:
            return batch, as_found(error), work
        finally:
            work.seconds = time.monotonic() - begin
        work.batches += 1
        work.requests += len(batch.entries)
        work.compared += ran.compared
        work.aborted += len(ran.aborted)
        work.restarted += len(ran.restarted)
        work.steps += ran.steps
    work.distinct = len(known)
    return None, None, work


def as_found(error: BaseException) -> Found:
    if isinstance(error, Found):
        return error
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = "".join(traceback.format_exception(error, limit=-4))
    return Found(f"{type(error).__name__} in {Path(where.filename).name}:{where.name}", text)


# -- batches -------------------------------------------------------------------------------


def drawn_batch(rng: random.Random, pair: Pair, pool: list[Given], work: Shift, most: int) -> Batch:
    """`pool`: the requests so far. Most of a batch was asked before, in other company."""
    entries = []
    for number in range(min(most, rng.choice((1, 2, 3, 6, 10, 16, 24)))):
        if pool and rng.random() < REPEATED:
            given = rng.choice(pool[-200:])
        else:
            given = accepted_request(rng, pair, work)
            pool.append(given)
        arrives = rng.choice((0, rng.randint(0, 20)))
        # counted, not drawn: in a short run, too, some client leaves, half of them at once
        leaving = (work.requests + number) % LEAVES_EVERY == 0
        leaves = arrives + rng.choice((1, rng.randint(0, 25))) if leaving else None
        entries.append(Entry(given, arrives, leaves))
    resets = rng.choice((1, 2)) if work.batches % 2 == 0 else 0
    return Batch(tuple(entries), tuple(sorted(rng.randint(1, rng.choice((3, 30))) for _ in range(resets))))


def accepted_request(rng: random.Random, pair: Pair, work: Shift) -> Given:
    server = pair.tight.model_config.dlm_options
    while True:
        given = drawn_request(rng, pair.model, server)
        if (field := refusal(pair, given)) is None:
            options = request_options(server, given.fields["extra_args"])
            work.covered[options.decoding.name, options.reuse.name, options.selection.name] += 1
            return given
        work.refused[field] += 1


def refusal(pair: Pair, given: Given) -> str | None:
    """The field by which the front-end refuses a request."""
    engine = pair.tight.llm_engine
    try:
        engine.input_processor.process_inputs(
            "asked", given.prompt_ids, given.params(), supported_tasks=engine.get_supported_tasks()
        )
    except OptionError as error:
        return error.field
    except ValueError as error:
        return getattr(error, "parameter", None) or str(error)[:60]
    return None


# -- failures ------------------------------------------------------------------------------


def smallest(pair: Pair, batch: Batch, found: Found) -> tuple[Batch, Found, int]:
    """Each try runs on a copy of engines that have served nothing, so what only a long history shows stays whole."""
    tried, last = 0, found

    def fails(candidate: Batch) -> bool:
        nonlocal tried, last
        tried += 1
        try:
            in_a_fork(partial(try_batch, pair, candidate), seconds=60)
        except Found as again:
            if again.kind == found.kind:
                last = again
                return True
        return False

    return (shrink(batch, fails) if fails(batch) else batch), last, tried


def try_batch(pair: Pair, batch: Batch) -> None:
    if any(refusal(pair, entry.given) for entry in batch.entries):
        return
    try:
        check(pair, batch, {})
    except BaseException as error:
        raise as_found(error) from None


def replay(server: Server, batch: Batch) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        check(Pair(server).started(), batch, {})
        print("The batch passes.")
