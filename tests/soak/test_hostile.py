"""The table of hostile requests and what is concluded from a run of it, without a server."""

import json
import socket
import threading
from collections import Counter
from dataclasses import fields, replace

import pytest

from tests.soak.hostile import acts, given, races, scores
from tests.soak.hostile import run as hostile
from tests.soak.hostile import table as hostile_table
from tests.soak.hostile.acts import ACTS, Outcome, Wire, message_of, outcome_of
from tests.soak.hostile.health import Health, Probe
from tests.soak.hostile.hooks import Hooks, Span
from tests.soak.hostile.life import RowResult, judge
from tests.soak.hostile.options import decoding_fields, range_of
from tests.soak.hostile.rows import LEGAL, REFUSED, Row, Target, completion, table
from vllm_dlm.methods import methods
from vllm_dlm.options import OptionError, request_keys, request_options
from vllm_dlm.options.limits import Limits

TARGET = Target(1024, 512, 2, large=1 << 14)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return table(TARGET)


def test_every_option_is_tried_at_its_largest_and_above(rows):
    assert len(rows) >= 120
    names = {row.name for row in rows}
    for key in {key for cls in methods("decoding").values() for key in request_keys(cls())}:
        if key in ("dlm_template", "dlm_suffix", "dlm_start", "dlm_remask"):  # rows of their own
            assert any(row.kind in ("given", "template") and key in json_of(row) for row in rows), key
        else:
            assert {f"{key}, largest", f"{key}, one above", f"{key}, absurd"} <= names


def json_of(row: Row) -> str:
    return row.make(TARGET, 7).body.decode(errors="replace")


def test_the_largest_value_is_accepted_and_no_larger_one():
    for key, (name, cls, field) in decoding_fields().items():
        found = range_of(TARGET.server, name, cls, field, TARGET.large)
        request_options(TARGET.server, {**found.others, key: found.largest})
        for value in (found.above, found.absurd):
            with pytest.raises(OptionError):
                request_options(TARGET.server, {**found.others, key: value})


def test_every_limit_has_rows():
    """With a limit of another size, the table has other rows."""

    def sent(target: Target) -> list:
        made = (row for module in (given, scores, acts) for row in module.rows(target))
        return [(row.name, row.make(target, 7).body, row.clients) for row in made]

    usual = sent(TARGET)
    for field in fields(Limits):
        smaller = replace(TARGET.server, limits=replace(Limits(), **{field.name: 3}))
        assert sent(replace(TARGET, server=smaller)) != usual, field.name


def test_no_two_messages_of_a_row_with_a_cache_are_the_same(rows):
    for row in rows:
        if row.kind in ("template", "given", "policies"):
            assert row.act in ACTS
            other = message_of(row, replace(TARGET, seed=1), 8).body
            assert len({message_of(row, TARGET, 7).body, message_of(row, TARGET, 8).body, other}) == 3, row.name


# -- what is concluded ---------------------------------------------------------------------


def work_of(*results: RowResult, **more) -> hostile.Work:
    steps = [Span(0, 0.01, 0.01, 100)] * 100
    return hostile.Work(list(results), steps=steps, **{"memory": [{"engine 1": [100.0, 110.0]}]} | more)


ROW = Row("option", "x", completion(), LEGAL)
FINE = RowResult(ROW, Counter({200: 2}), health_ms=20, step_ms=30)


def test_a_sound_run_misses_no_bar():
    assert hostile_table.missed(work_of(FINE)) == []


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (work_of(replace(FINE, health_ms=251)), "/health took 251 ms"),
        (work_of(replace(FINE, step_own_ms=101)), "a step took 101 ms, the bar is 100"),
        (work_of(replace(FINE, arrival_ms=101)), "the arrival of a request took 101 ms"),
        (work_of(FINE, memory=[{"front-end 1": [100.0, 133.0]}]), "front-end 1: 33 MiB more"),
        (work_of(FINE, memory=[{"front-end 1": [100.0, None]}]), "the server ended"),
        (work_of(FINE, changed=["answered otherwise"]), "1 good answers changed"),
        (work_of(FINE, race_problems=["race 3: a frame of choice 2"]), "race 3"),
        (work_of(replace(FINE, problems=["1 answered 500"])), "1 answered 500"),
    ],
)
def test_each_bar_can_be_missed(work, why):
    (missed,) = hostile_table.missed(work)
    assert why in missed


def test_a_body_that_is_expensive_for_vllm_has_a_higher_bar():
    control = RowResult(replace(ROW, kind="control", control=True, like="ids"), health_ms=400)
    same, other = (replace(FINE, row=replace(ROW, like=like), health_ms=590) for like in ("ids", "text"))
    assert hostile_table.missed(work_of(control, same)) == []
    assert len(hostile_table.missed(work_of(control, other))) == 1
    assert len(hostile_table.missed(work_of(control, replace(same, health_ms=610)))) == 1


@pytest.mark.parametrize(
    ("row", "statuses", "sound"),
    [
        (ROW, (200, 200), True),
        (ROW, (200, 400), False),
        (ROW, (500,), False),
        (ROW, (None,), False),
        (replace(ROW, long=True), (None,), True),
        (replace(ROW, long=True), (503,), False),
        (replace(ROW, expected=REFUSED), (400, 413, 429), True),
        (replace(ROW, expected=REFUSED), (200,), False),
    ],
)
def test_statuses_are_judged(row, statuses, sound):
    result = RowResult(row)
    judge(result, [Outcome(status) for status in statuses])
    assert (not result.problems) == sound and result.answers.total() == len(statuses)


def test_an_error_within_a_stream_is_one():
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    assert outcome_of(head + b'data: {"choices": []}\n\n').status == 200
    assert outcome_of(head + b'data: {"error": {"message": "", "code": 500}}\n\ndata: [DONE]').status == 500
    assert outcome_of(head + b'data: {"error": {"message": "", "code": 400}}\n\n').status == 400
    assert outcome_of(head + b'{"choices": [{"finish_reason": "error"}]}').status == 500
    assert outcome_of(b"HTTP/1.1 413 Too large\r\n\r\n").status == 413
    assert outcome_of(b"").status is None


def stream(*chunks: dict) -> bytes:
    return b"".join(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks) + b"data: [DONE]\n\n"


def frame(choice: int | None, *tokens: tuple[int, int]) -> dict:
    entries = [[position, token, "", 1.0, 1] for position, token in tokens]
    said = {"step": 1, "set": entries, "unset": [], "edited": []}
    return {"choices": [], "dlm": said if choice is None else {"choice": choice} | said}


def chunk(index: int, *tokens: int) -> dict:
    return {"choices": [{"index": index, "token_ids": list(tokens)}]}


def test_frames_of_another_client_are_noticed():
    def wrong(answer: bytes, samples: int = 1) -> list[str]:
        return races.wrong(Outcome(200), answer, samples)

    assert wrong(stream(frame(None, (0, 7), (1, 8)), chunk(0, 7, 8))) == []
    assert wrong(stream(frame(0, (0, 7)), frame(1, (0, 9)), chunk(0, 7), chunk(1, 9)), 2) == []
    assert wrong(stream(frame(None, (0, 7), (1, 9)), chunk(0, 7, 8)))  # other tokens
    assert wrong(stream(chunk(0, 7, 8)))  # no frames
    assert wrong(stream(frame(2, (0, 7)), chunk(0, 7)))  # a choice that the request does not have
    assert wrong(stream(frame(None, (0, 7))))  # no tokens
    assert wrong(stream(frame(None, (0, 7)), chunk(0, 7)).replace(b"[DONE]", b""))
    assert races.wrong(Outcome(400), b"", 1)


# -- what measures -------------------------------------------------------------------------


def test_health_is_polled_from_outside(tmp_path):
    """By a server that answers the first question, and the second one when it is told to."""
    go = threading.Event()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Health("127.0.0.1", server.getsockname()[1], tmp_path) as health,
    ):

        def answer(wait: bool) -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                if wait:
                    go.wait()
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

        answer(False)
        second = threading.Thread(target=answer, args=(True,))
        second.start()
        blocked = health.since(0, float("inf"), 0.5)
        assert blocked[-1].status == 0  # what has waited so far counts, and is no answer
        go.set()
        second.join()
        answer(False)
        health.since(0, 0, 10)
        assert [probe.status for probe in health.probes()[:2]] == [200, 200]
        server.close()


def test_probes_that_overlap_count(tmp_path, monkeypatch):
    health = Health("", 0, tmp_path)
    probes = [Probe(1, 0.5, 0, 200), Probe(2, 5, 0, 200), Probe(8, 0.1, 0, 200), Probe(9, 0.1, 0, 200)]
    monkeypatch.setattr(health, "probes", lambda: probes)
    assert health.since(3, 8.5, 1) == probes[1:3]


def test_hooks_are_read_while_they_are_written(tmp_path):
    hooks = Hooks(tmp_path)
    assert hooks.spans() == []
    from tests.soak.hostile.hooks import RECORD

    (tmp_path / "steps").write_bytes(RECORD.pack(1, 0.5, 0.4, 64) + RECORD.pack(2, 0.1, 0.1, -1)[:9])
    assert hooks.spans() == [Span(1, 0.5, 0.4, 64)]
    assert not hooks.settle([1], patience=0)
    (tmp_path / "settled-1").write_text(str(hooks.number + 1))
    assert hooks.settle([1], patience=0)


def test_a_client_that_gets_no_answer_says_so():
    with socket.create_server(("127.0.0.1", 0)) as server:
        wire = Wire("127.0.0.1", server.getsockname()[1])
        outcome, _ = wire.ask(message_of(ROW, TARGET, 1).raw(), 0)
        assert outcome.status is None
