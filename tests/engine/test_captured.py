"""Steps that are replayed over memory that stays in place give the same tokens as launched ones, whatever the padding.

There is no GPU here: instead of replaying a graph, the function is called
again, over the memory and with the sizes it was captured with.
"""

import random

import pytest
import torch
from vllm import SamplingParams

from tests.engine.capture import capturing
from tests.engine.running import Counted, runner_of, tokens
from tests.engine.test_block_causal import mixed as blocks
from tests.engine.test_drafts import given as drafting
from tests.engine.test_reuse_golden import FAST, OFFICIAL, assert_fast_run, assert_official_outputs, fast, official
from tests.tiers import first_of_each, in_turn
from vllm_dlm.methods import methods
from vllm_dlm.step.buckets import ROWS

__all__ = ["capturing"]  # a fixture
REUSES = sorted(name for name, reuse in methods("reuse").items() if reuse.caches)


def some(reuse: str, count: int, guided: bool = False):
    rng = random.Random(reuse)
    for index in range(count):
        extra = {"dlm_reuse": reuse, "dlm_block_length": rng.choice([8, 16])}
        if guided and index % 3 == 1:
            extra["dlm_cfg_scale"] = 0.5
        params = SamplingParams(
            temperature=0.5 * (index % 4 == 3),
            seed=index,
            max_tokens=rng.randint(8, 24),
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield {"prompt_token_ids": [rng.randrange(390) for _ in range(rng.randint(1, 60))]}, params


@pytest.mark.parametrize("checkpoint", ["llada-tiny", "dream-tiny"])
@pytest.mark.parametrize("reuse", REUSES)
def test_replayed_steps_are_the_steps(engines, capturing, checkpoint, reuse):
    llm = engines(checkpoint)
    given = list(some(reuse, 6, guided=True))
    with Counted(llm) as plain:
        wanted = tokens(llm, given)
    captured = capturing(llm)
    captured.partial_alone = True  # a replayed whole canvas counts rows that its last layer leaves out when launched
    with Counted(llm) as counted:
        for cache in runner_of(llm).kv_caches:
            cache.fill_(torch.nan)  # the null block, too
        assert tokens(llm, given) == wanted
    partial = [bucket for bucket in captured.met if bucket is not None and not bucket.whole]
    assert sum(bucket in captured.steps for bucket in partial) > len(partial) / 3
    if reuse in ("fast_dllm", "dllm_cache"):  # others count rows that ride along
        assert counted.total("pairs") == plain.total("pairs") and counted.total("keys_read") == plain.total("keys_read")


@pytest.mark.parametrize("checkpoint, reuse", in_turn(["llada-tiny", "dream-tiny"], sorted(methods("reuse"))))
def test_whole_canvases_are_replayed_when_their_size_comes_again(engines, capturing, checkpoint, reuse):
    """Alone, side by side, and beside steps between refreshes"""
    llm = engines(checkpoint)
    given = list(some(reuse, 7, guided=True))
    wanted = tokens(llm, given)
    captured = capturing(llm)
    for cache in runner_of(llm).kv_caches:
        cache.fill_(torch.nan)
    assert [tokens(llm, [request])[0] for request in given] == wanted
    assert tokens(llm, given) == wanted and tokens(llm, given[::-1]) == wanted[::-1]
    whole = [bucket for bucket in captured.met if bucket in captured.steps and bucket.whole]
    assert len(set(whole)) >= 2 and len(whole) >= 4 and not len(captured.refused)


def test_blocks_are_replayed(engines, capturing):
    """Where a finished block's rows ride along, and where they do not."""
    for checkpoint in ("sdar-tiny", "llada2-tiny"):
        llm = engines(checkpoint)
        given = list(blocks(12, 24))
        wanted = tokens(llm, given)
        captured = capturing(llm)
        for cache in runner_of(llm).kv_caches:
            cache.fill_(torch.nan)
        assert tokens(llm, given) == wanted
        assert sum(bucket in captured.steps for bucket in captured.met) > len(captured.met) / 3


def path_of(run: dict) -> tuple:
    """How a recorded run recomputes rows: method, share of them by similarity, and whether there are two canvases."""
    return run["method"], run.get("rho"), "+" in run["file"]


@pytest.mark.parametrize("run", first_of_each(path_of, ((case.id, *case.values) for case in OFFICIAL)))
def test_official_outputs_when_replayed(engines, capturing, run):
    llm = official(engines, run)
    captured = capturing(llm)
    assert_official_outputs(llm, run)
    assert any(bucket in captured.steps for bucket in captured.met)


def fast_path_of(name: str) -> tuple:
    return name.partition(".")[0], FAST[name]["cache"]


@pytest.mark.parametrize("name", first_of_each(fast_path_of, ((name, name) for name in FAST)))
def test_fast_dllm_runs_when_replayed(engines, golden_runs, capturing, name):
    llm = fast(engines, golden_runs, name)
    captured = capturing(llm)
    assert_fast_run(llm, golden_runs, name)
    assert any(bucket in captured.steps for bucket in captured.met)


def test_every_boundary_is_crossed(engines, capturing):
    """One to 33 canvases: rows and canvases pass each size that such a short context has, and the last."""
    llm = engines("llada-tiny", max_num_batched_tokens=4096)
    longest = runner_of(llm).max_model_len
    params = SamplingParams(
        temperature=0,
        max_tokens=40,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_reuse": "fast_dllm", "dlm_block_length": 40, "dlm_steps": 5},
    )
    given = [({"prompt_token_ids": [7 + index] * (3 + index)}, params) for index in range(33)]
    alone = [tokens(llm, [request])[0] for request in given]
    captured = capturing(llm)
    for count in (1, 2, 3, 4, 5, 8, 17, 33):
        assert tokens(llm, given[:count]) == alone[:count]
    replayed = {bucket for bucket in captured.met if bucket in captured.steps and not bucket.whole}
    assert {bucket.rows for bucket in replayed} >= {64, 96, 128, 192, 256, 384, 1024}
    assert {bucket.canvases for bucket in replayed} == {2, 4, 8, 16, 32} and None in captured.met
    costs, states = runner_of(llm).captured_costs, [step.hidden for step in captured.steps.values()]
    left = costs.room(longest) - costs.working(max(map(len, states)))
    assert left > sum(hidden.nbytes for hidden in states) and captured.room >= 0


def test_what_there_is_no_room_for_is_launched(engines, capturing):
    llm = engines("llada-tiny")
    given = list(some("fast_dllm", 3))
    wanted = tokens(llm, given)
    one = runner_of(llm).captured_costs.step(max(ROWS))
    captured = capturing(llm, one)
    assert tokens(llm, given) == wanted
    launched = {bucket for bucket in captured.met if bucket is not None} - set(captured.steps)
    assert len(captured.steps) == 1 and launched and captured.room < one


def test_memory_that_ends_leaves_steps_launched(engines, capturing):
    llm = engines("llada-tiny")
    given = list(some("fast_dllm", 3))
    wanted = tokens(llm, given)
    captured = capturing(llm)

    def full(run):
        raise torch.OutOfMemoryError

    captured.capture = full
    assert tokens(llm, given) == wanted and not captured.steps and not captured.room


def test_drafts_are_canvases_of_a_step(engines, capturing):
    llm = engines("llada-tiny")
    wanted = tokens(llm, list(drafting(1, 8, new=16)))
    captured = capturing(llm)
    for _ in range(2):  # a step is captured on its second use
        assert tokens(llm, list(drafting(1, 8, new=16))) == wanted
    assert any(bucket.canvases > 1 for bucket in captured.met if bucket in captured.steps)
