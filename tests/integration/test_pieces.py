"""Large log-probabilities reach vLLM's output processor in pieces; nothing is lost, doubled or reordered."""

import asyncio
from collections import deque
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import LogprobsLists

from vllm_dlm.integration.pieces import ENTRIES, get_output_async, size


def output(name: str, tokens: int, width: int, **fields) -> EngineCoreOutput:
    ids = np.arange(tokens * width, dtype=np.int32).reshape(tokens, width)  # [T, width]
    logprobs = LogprobsLists(ids, -ids.astype(np.float32), ids[:, 0]) if width else None
    return EngineCoreOutput(name, list(range(tokens)), new_logprobs=logprobs, **fields)


def received(*messages: EngineCoreOutputs, pieces=()) -> list[EngineCoreOutputs]:
    """What a client returns until every message was asked for and no piece is left."""
    sent = iter(messages)

    async def get(client):
        return next(sent)

    async def all_of(client):
        found = []
        while len(found) < len(messages) or client.dlm_pieces:
            found.append(await get_output_async(get)(client))
        return found

    return asyncio.run(all_of(SimpleNamespace(dlm_pieces=deque(pieces))))


@pytest.mark.parametrize("width", [2, 21, 5000])
def test_pieces_make_up_the_whole(width):
    last = {"finish_reason": FinishReason.LENGTH, "stop_reason": 7}
    outputs = [output("a", 3, 0), output("b", 1000, width, events=[], **last), output("c", 2, width), output("d", 0, 0)]
    found = received(EngineCoreOutputs(3, outputs, SchedulerStats(), 5.0, finished_requests={"b"}, weight_version="w"))
    assert all(sum(map(size, each.outputs)) <= max(ENTRIES, width) for each in found)
    assert {(each.engine_index, each.timestamp, each.weight_version) for each in found} == {(3, 5.0, "w")}
    assert [each.scheduler_stats is None for each in found] == [True] * (len(found) - 1) + [False]
    assert [each.finished_requests for each in found] == [None] * (len(found) - 1) + [{"b"}]
    parts = [part for each in found for part in each.outputs]
    assert [name for name, _ in groupby(part.request_id for part in parts)] == [*"abcd"]
    for whole in outputs:
        own = [part for part in parts if part.request_id == whole.request_id]
        assert [token for part in own for token in part.new_token_ids] == whole.new_token_ids
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [whole.finish_reason]
        assert [part.stop_reason for part in own] == [None] * (len(own) - 1) + [whole.stop_reason]
        assert [part.events for part in own] == [whole.events] + [None] * (len(own) - 1)
        if whole.new_logprobs is not None:
            for index in range(3):
                there = np.concatenate([part.new_logprobs[index] for part in own])
                assert np.array_equal(there, whole.new_logprobs[index])


def test_what_is_small_is_passed_on_as_it_is():
    message = EngineCoreOutputs(outputs=[output("a", 40, 21), output("b", 5000, 0)])
    assert received(message)[0] is message


def test_other_tasks_run_between_pieces():
    turns = []

    async def get(client):
        return EngineCoreOutputs(outputs=[output("a", 1000, 21)])

    async def main():
        client = SimpleNamespace(dlm_pieces=deque())
        other = asyncio.create_task(count())
        while len(turns) < 5:
            await get_output_async(get)(client)
        await other

    async def count():
        for turn in range(5):
            turns.append(turn)
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), 10))


def test_other_models_are_left_alone():
    message = EngineCoreOutputs(outputs=[output("a", 1000, 21)])

    async def get(client):
        return message

    assert asyncio.run(get_output_async(get)(SimpleNamespace())) is message
