"""Many requests of random policies, lengths and aborts under a tight memory limit."""

import random

import pytest
import torch
from vllm import SamplingParams

from tests.engine.test_invariance import ALGORITHMS, tokens
from tests.engine.test_reuse import POLICIES
from tests.engine.test_reuse_golden import runner_of


def request(rng: random.Random):
    length = rng.randint(1, 40)
    extra = {
        "dlm_reuse": rng.choice(POLICIES), "dlm_block_length": rng.choice([4, 8, 32]),
        "dlm_algorithm": rng.choice(ALGORITHMS),
    }  # fmt: skip
    if rng.random() < 0.2:
        extra["dlm_cfg_scale"] = 1.0
    params = SamplingParams(
        temperature=rng.choice([0, 0.8]), seed=rng.randint(0, 1 << 30), max_tokens=length,
        ignore_eos=rng.random() < 0.7, detokenize=False, extra_args=extra,
    )  # fmt: skip
    return {"prompt_token_ids": [rng.randint(0, 389) for _ in range(rng.randint(1, 120))]}, params


def soak(engines, count: int, checked: int) -> None:
    tight = engines("llada-tiny", block_size=32, num_gpu_blocks_override=40, max_num_batched_tokens=512)
    core, engine, rng = tight.llm_engine.engine_core.engine_core, tight.llm_engine, random.Random(count)
    for cache in runner_of(tight).kv_caches:
        cache.fill_(torch.nan)  # whoever reads what it did not write is found out
    given, done, waiting, aborted = [request(rng) for _ in range(count)], {}, list(range(count)), set()
    restarted = set()
    while waiting or engine.has_unfinished_requests():
        while waiting and rng.random() < 0.5:
            index = waiting.pop()
            engine.add_request(str(index), *given[index])
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = tuple(output.outputs[0].token_ids)
        if rng.random() < 0.1 and core.scheduler.running:
            victim = rng.choice([*core.scheduler.running, *core.scheduler.waiting])
            name = victim.request_id.rsplit("-", 1)[0]
            aborted.add(int(name))
            engine.abort_request([name])
        if rng.random() < 0.01:
            restarted |= {int(running.request_id.rsplit("-", 1)[0]) for running in core.scheduler.running}
            core.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(done) + len(aborted) == count and aborted
    assert core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 39
    assert not core.scheduler.canvases and not core.scheduler.preempted
    # A restarted request begins its block with a full forward: the same for `none`, a refresh sooner for others.
    same = [i for i in sorted(done) if i not in restarted or given[i][1].extra_args["dlm_reuse"] == "none"]
    assert len(same) >= checked
    for index in rng.sample(same, checked):
        assert tokens(engines("llada-tiny"), [given[index]]) == [done[index]], index


def test_soak(engines):
    soak(engines, count=60, checked=15)


@pytest.mark.slow
def test_long_soak(engines):
    soak(engines, count=500, checked=150)
