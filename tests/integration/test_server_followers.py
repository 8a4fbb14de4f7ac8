"""Hostile requests that are watched, at a server with the live view: see test_server_hostile.py."""

import time

from tests.integration.serving import KEY
from tests.soak.hostile import acts, races
from tests.soak.hostile.acts import Wire
from tests.soak.hostile.life import RowResult, judge
from tests.soak.hostile.rows import Target, table
from vllm_dlm.demo.server import HOST


def test_followers(viewed):
    """Requests that are watched, and followed by more connections than read"""
    view = Target(1024, 512, 2, model=viewed.model, flood=4, headers={"Authorization": f"Bearer {KEY}"})
    wire, problems = Wire(HOST, viewed.port), []
    for row in table(view):
        if row.kind == "view" or row.act == "watch":
            numbers = range(min(row.clients, 8))
            result = RowResult(row)
            judge(result, acts.ACTS[row.act](wire, view, row, numbers, time.monotonic() + 120))
            problems += [f"{row.name}: {problem}" for problem in result.problems]
    assert not problems, "\n".join(problems)


def test_two_requests_with_one_name(viewed):
    view = Target(1024, 512, 2, model=viewed.model, headers={"Authorization": f"Bearer {KEY}"})
    wire = Wire(HOST, viewed.port)
    assert [why for number in range(10) for why in races.race(wire, view, number)] == []
