"""The table of hostile requests in small: status codes, and the answers of others in the meantime.

`python -m tests.soak --hostile` sends the same rows at full size and measures what they cost.
"""

import time

import pytest

from tests.integration.conftest import DLM_CONFIG
from tests.soak.clients import Client
from tests.soak.hostile import acts
from tests.soak.hostile.acts import Wire
from tests.soak.hostile.good import GoodClients, known_requests
from tests.soak.hostile.life import RowResult, judge
from tests.soak.hostile.rows import Target, table
from vllm_dlm.demo.server import HOST
from vllm_dlm.options import server_options

VOCABULARY, MASK = 512, 2
SECONDS = 120  # for an answer
KINDS = ("option", "policies", "control", "field", "body", "template", "given", "score", "stream", "one X-Request-Id")


@pytest.fixture(scope="module")
def target(server) -> Target:
    config = server_options(DLM_CONFIG, "low_confidence")
    return Target(512, VOCABULARY, MASK, config, model=server.model, view=False, large=1 << 14, flood=4)


@pytest.fixture(scope="module")
def rows(target):
    """Without those that take seconds"""
    return [row for row in table(target) if not row.long or row.kind in ("stream", "one X-Request-Id")]


@pytest.fixture(scope="module")
def known(server):
    client = Client(HOST, server.port, 512, VOCABULARY, MASK)
    asked = []
    for request in list(known_requests())[-8:]:
        request.body |= {"model": server.model}
        status, request.answer = client.ask(request)
        assert status == 200, request.body
        asked.append(request)
    return client, asked


def test_every_kind_is_tried(rows):
    assert {row.kind for row in rows} == set(KINDS)
    assert len(rows) >= 120


def assert_answered(server, target, known, rows) -> None:
    wire, problems, number = Wire(HOST, server.port), [], 0
    client, asked = known
    with GoodClients(client, asked) as good:
        for row in rows:
            numbers = range(number, number + min(row.clients, target.flood))
            number = numbers.stop
            result = RowResult(row)
            judge(result, acts.ACTS[row.act](wire, target, row, numbers, time.monotonic() + SECONDS))
            problems += [f"{row.name}: {problem}" for problem in result.problems]
    assert not problems, "\n".join(problems)
    assert not good.changed


def test_some_rows_of_each_kind_are_answered_as_they_must_be(server, target, rows, known):
    assert_answered(server, target, known, [row for kind in KINDS for row in of_kind(rows, kind)[::8]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_answered_as_they_must_be(server, target, rows, known, kind):
    assert_answered(server, target, known, of_kind(rows, kind))


def of_kind(rows, kind: str) -> list:
    return [row for row in rows if row.kind == kind]
