"""The parts of the long runs that need no engine."""

import ast
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.soak import memory, process
from tests.soak.batch import Batch, Entry
from tests.soak.fork import Found, in_a_fork
from tests.soak.requests import Given, Model, drawn_request, drawn_server, names
from tests.soak.shrink import shrink
from vllm_dlm.methods import KINDS, methods
from vllm_dlm.options import METHOD_KEYS, request_options, server_options

MODEL = Model(max_len=256, vocab_size=512, mask_id=392)
SERVER = server_options({}, "low_confidence")


def drawn(count: int) -> list[Given]:
    rng = random.Random(0)
    return [drawn_request(rng, MODEL, SERVER) for _ in range(count)]


def test_everything_registered_is_drawn():
    extras = [given.fields["extra_args"] for given in drawn(4000)]
    for key, kind in METHOD_KEYS.items():
        assert {extra.get(key) for extra in extras} >= set(methods(kind))
    presets = {extra.get("dlm_reuse") for extra in extras} | {extra.get("dlm_selection") for extra in extras}
    assert presets > {name for kind in ("reuse", "selection") for name in names(kind) if "/" in name}


def test_most_of_what_is_drawn_is_legal():
    legal = 0
    for given in drawn(400):
        assert 1 <= len(given.prompt) < MODEL.max_len
        try:
            request_options(SERVER, given.fields["extra_args"])
            legal += 1
        except ValueError:
            continue
    assert legal > 250


def test_a_request_is_its_own_source():
    for given in drawn(20):
        call = ast.parse(repr(given), mode="eval").body
        assert call.func.id == "Given"
        assert Given(**{word.arg: ast.literal_eval(word.value) for word in call.keywords}) == given


@pytest.mark.parametrize("selection", sorted(methods("selection")))
def test_servers_select_at_small_lengths(selection):
    for seed in range(5):
        options = server_options(drawn_server(random.Random(seed), "entropy", selection), "entropy")
        assert {kind for kind in KINDS if getattr(options, kind).name not in methods(kind)} == set()
        assert options.selection.name == selection
        if options.selection.sparse:
            assert options.selection.applies(200, 220)


def test_servers_begin_with_the_defaults_of_each_checkpoint():
    made = [
        server
        for server, _ in zip(
            process.servers(0, "float32", ["a", "b"]), range(2 + 8 * len(methods("selection"))), strict=False
        )
    ]
    assert [(server.label, server.dlm) for server in made[:2]] == [("a", {}), ("b", {})]
    assert {server.dlm["selection"]["name"] for server in made[2:]} == set(methods("selection"))


def test_a_failing_batch_becomes_small():
    def entry(number, **extra):
        return Entry(
            Given((5,) * 40, {"max_tokens": 30, "temperature": 1.0, "seed": number, "extra_args": extra}),
            number,
            90,
        )

    batch = Batch(
        tuple(entry(i, dlm_steps=i, dlm_reuse="dyllm" if i in (3, 11) else "none") for i in range(16)), (4, 9)
    )

    def fails(candidate):
        reuse = [e.given.fields["extra_args"].get("dlm_reuse") for e in candidate.entries]
        return reuse.count("dyllm") == 2

    small = shrink(batch, fails)
    assert not small.resets and len(small.entries) == 2
    for left in small.entries:
        assert left.arrives == 0 and left.leaves is None and len(left.given.prompt) == 1
        assert left.given.fields == {
            "max_tokens": 1,
            "temperature": 0,
            "seed": left.given.fields["seed"],
            "extra_args": {"dlm_reuse": "dyllm"},
        }


def test_what_breaks_in_a_fork_stays_there():
    assert in_a_fork(lambda: sum(range(10))) == 45
    with pytest.raises(Found, match="ZeroDivisionError"):
        in_a_fork(lambda: 1 // 0)
    with pytest.raises(Found, match="death"):
        in_a_fork(lambda: os._exit(3))
    with pytest.raises(Found, match="hang"):
        in_a_fork(lambda: time.sleep(600), seconds=0.2)


def test_slope_and_its_error():
    rng = np.random.default_rng(0)
    x = np.arange(400) / 100
    flat, error = memory.slope(x, 1000 + rng.normal(0, 5, 400))
    assert abs(flat) < 3 * error
    rising, error = memory.slope(x, 1000 + 20 * x + rng.normal(0, 5, 400))
    assert rising == pytest.approx(20, abs=3 * error) and error < 2
    assert memory.grows(rising, error, 4, 1000) and not memory.grows(flat, error, 4, 1000)
    assert not memory.grows(rising, error, 0.5, 1000)  # a hundredth is not worth a word


def samples(values: list[int]) -> list[memory.Sample]:
    """One after each 50 requests"""
    return [memory.Sample(50 * (at + 1), 0.0, "front-end 1", value, 1, 1) for at, value in enumerate(values)]


def test_the_least_memory_of_each_stretch():
    rng = np.random.default_rng(0)
    in_flight = (rng.exponential(40_000, 400)).astype(int)  # KiB that come and go
    assert memory.least_of_stretches(samples([500, 400, 600] + [700] * 20)) == [(1000, 400)]
    per, error, grows = memory.least_growth(samples([800_000 + extra for extra in in_flight.tolist()]))
    assert not grows and abs(per) < 3 * error
    leaking = [800_000 + 150 * at + extra for at, extra in enumerate(in_flight.tolist())]
    per, error, grows = memory.least_growth(samples(leaking))
    assert grows and per == pytest.approx(3000, rel=0.3) and error < 500
    assert memory.least_growth(samples([800_000] * 30)) == (0.0, float("inf"), False)


def test_a_session_is_seen():
    """One of its own: in a container the tests' session may be that of the kernel's threads, which hold nothing."""
    wait = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child:
        child.stdout.readline()
        [seen] = memory.sample(child.pid, 7, 3.0)
        child.communicate(b"\n")
    assert seen.rss_kib > 0 and seen.threads == 1 and seen.descriptors >= 3 and seen.requests == 7
    assert memory.sample(child.pid, 7, 3.0) == []
