"""Prefixes in vLLM's cache: what is found there changes no token, and is not computed again."""

from itertools import product

import pytest
import torch

from tests.engine.prefixes import (
    CHECKPOINTS,
    OTHERS,
    SHIFTED,
    SIZE,
    TIGHT,
    USUAL,
    Known,
    ask,
    caching,
    mixed,
    outputs,
    some,
    without,
)
from tests.engine.running import Rows, Watching, core_of, poison, runner_of, tokens
from tests.tiers import in_turn, slow
from vllm_dlm.families import FAMILIES

#: checkpoint, order of requests
ORDERS = [(CHECKPOINTS[0], 1), *slow(*list(product([*CHECKPOINTS, SHIFTED], [1, -1]))[1:])]


def test_checkpoints_of_all_such_families():
    """As far as they differ in what may be found"""
    kinds = {family.logits_shift for family in FAMILIES.values() if family.attention == "block_causal"}
    assert kinds == {FAMILIES["SDARForCausalLM"].logits_shift, FAMILIES["Fast_dLLM_QwenForCausalLM"].logits_shift}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_shared_prompt_is_computed_once(engines, checkpoint):
    llm, stem = caching(engines, checkpoint), some(1024)
    given = [ask(stem + some(rest, rest), 8, dlm_block_length=4) for rest in (30, 41, 0)]
    wanted = tokens(without(engines, checkpoint), given)
    metrics = counted(llm)
    found, live = [], []
    for request, want in zip(given, wanted, strict=True):
        with Rows(llm) as rows:
            got, hits = outputs(llm, [request])
        assert got == [want]
        found += hits
        live.append(rows.live)
    assert found == [0, 1024, 1024]
    # the prompt's whole blocks and the one that is being filled; behind 1,024 positions in a second step
    assert sum(live[0][:2]) == 1024 + 28 + 4
    assert live[1][0] == 40 + 4 and live[2][0] == 4
    assert {rows for own in live for rows in own[2:]} == {4, 8}
    after = counted(llm)
    assert after["vllm:prefix_cache_hits"] - metrics["vllm:prefix_cache_hits"] == 2048
    assert after["vllm:prefix_cache_queries"] - metrics["vllm:prefix_cache_queries"] == 3 * 1024 + 71


def counted(llm) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


@pytest.mark.parametrize(
    "checkpoint, order",
    ORDERS,
)
def test_one_after_the_other(engines, checkpoint, order):
    """Hits are those that the texts say, and change no token."""
    given = list(mixed(48))[::order]
    wanted = tokens(without(engines, checkpoint), given)
    llm, known, found = caching(engines, checkpoint), Known(USUAL[checkpoint], int(checkpoint == SHIFTED)), []
    for request, want in zip(given, wanted, strict=True):
        got, (hit,) = outputs(llm, [request])
        assert got == [want], request
        assert hit == known.hit(*request, want), request
        found.append(hit)
    assert sum(hit > 0 for hit in found) > 10 and 0 in found


@pytest.mark.parametrize(
    "checkpoint, chunk",
    [(SHIFTED, 16), *slow(*product(CHECKPOINTS, [1024, 16]), (SHIFTED, 1024), *((name, 16) for name in OTHERS))],
)
def test_together(engines, monkeypatch, checkpoint, chunk):
    """Hits, misses, guided ones and those that start alike in the same step; in a second batch nearly all are hits."""
    given = list(mixed(24, 2))
    wanted = tokens(without(engines, checkpoint), given)
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", chunk)
    llm = caching(engines, checkpoint)
    first, found = outputs(llm, given)
    assert first == wanted and found[0] == 0
    again, found = outputs(llm, given[::-1])
    assert again == wanted[::-1] and sum(hit > 0 for hit in found) > 10
    rest, _ = outputs(llm, list(mixed(24, 3)))
    assert rest == tokens(without(engines, checkpoint), list(mixed(24, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, *OTHERS])
def test_little_memory(engines, checkpoint):
    """Requests wait, give up their blocks and find them again, or somebody else has them by then."""
    given = list(mixed(32, 4))
    wanted = tokens(without(engines, checkpoint), given)
    llm = caching(engines, checkpoint, **TIGHT)
    scheduler, resumed = core_of(llm).scheduler, []
    admitted = scheduler.prefixes.admitted
    scheduler.prefixes.admitted = lambda request, canvas: (
        resumed.append((request.num_preemptions, canvas.written)),
        admitted(request, canvas),
    )
    try:
        for _ in range(2):
            assert outputs(llm, given)[0] == wanted
    finally:
        del scheduler.prefixes.admitted
    assert any(count and written for count, written in resumed) and any(not written for _, written in resumed)


def test_an_answer_is_the_next_turns_prompt(engines):
    """Its keys and values are those of a prompt."""
    for checkpoint in CHECKPOINTS:
        llm, prompt = caching(engines, checkpoint), some(50, 7)
        (answer,), _ = outputs(llm, [ask(prompt, 80, dlm_block_length=8)])
        text = [*prompt, *answer]
        turn = ask(text + some(9, 8), 8, dlm_block_length=8)
        (blocks,) = cached(llm, text, 8)
        assert len(blocks) == 128 // SIZE  # of 130 tokens, the last ones were not read again
        before = [kv[blocks].clone() for kv in runner_of(llm).kv_caches]
        got, hits = outputs(llm, [turn])
        assert hits == [128] and got == tokens(without(engines, checkpoint), [turn])
        poison(llm)
        outputs(llm, [turn])
        (blocks,) = cached(llm, text, 8)
        for old, kv in zip(before, runner_of(llm).kv_caches, strict=True):
            torch.testing.assert_close(old, kv[blocks], atol=2e-5, rtol=1e-4)


def cached(llm, ids, width):
    """Blocks that a request with these tokens would find"""
    core, held = core_of(llm), []

    class Found(Watching):
        def step_begins(self, states):
            held.append(
                core.scheduler.kv_cache_manager.get_block_ids(states[0].req_id)[0][: states[0].canvas.written // SIZE]
            )

    with Found(llm):
        outputs(llm, [ask(ids, 1, dlm_block_length=width)])
    return held[:1]


@pytest.mark.parametrize("checkpoint, steps", in_turn(CHECKPOINTS, list(range(1, 7))))
def test_a_prompt_that_was_not_read_to_its_end(engines, monkeypatch, checkpoint, steps):
    """Its client leaves: what has been read is found, and no more."""
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", 24)
    llm, request = caching(engines, checkpoint), ask(some(120, 5), 12, dlm_block_length=4)
    engine = llm.llm_engine
    name = engine.add_request("left", *request)
    for _ in range(steps):
        engine.step()
    engine.abort_request([name], internal=True)
    engine.step()
    got, hits = outputs(llm, [request])
    assert hits == [min(24 * steps, 120) // SIZE * SIZE] and got == tokens(without(engines, checkpoint), [request])


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_reset_forgets_all(engines, monkeypatch, step):
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", 32)
    given = [ask(some(120, 6) + some(index, index), 12, dlm_block_length=4) for index in range(0, 12, 3)]
    wanted = tokens(without(engines, CHECKPOINTS[0]), given)
    llm, got = caching(engines, CHECKPOINTS[0]), {}
    for index, request in enumerate(given):
        llm.llm_engine.add_request(str(index), *request)
    at = 0
    while llm.llm_engine.has_unfinished_requests():
        if at == step:
            assert not llm.reset_prefix_cache()  # blocks are in use
            assert core_of(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
            for cache in runner_of(llm).kv_caches:
                cache.fill_(torch.nan)
        for output in llm.llm_engine.step():
            got[int(output.request_id)] = tuple(output.outputs[0].token_ids)
        at += 1
    assert [got[index] for index in range(len(given))] == wanted
    assert outputs(llm, given[:1])[1] == [96] and llm.reset_prefix_cache()
    assert outputs(llm, given[:1]) == (wanted[:1], [0])
