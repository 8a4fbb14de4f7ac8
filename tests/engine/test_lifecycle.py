"""What happens to requests between their first and their last step."""

import pytest
from vllm import SamplingParams

from tests.engine.batches import mixed_requests
from tests.engine.running import free_blocks, tokens

CHECKPOINT = "llada-tiny"


@pytest.fixture(scope="module")
def core(engines):
    return engines(CHECKPOINT).llm_engine.engine_core.engine_core


def add(llm, requests) -> list[str]:
    for index, (prompt, params) in enumerate(requests):
        llm.llm_engine.add_request(f"r{index}", prompt, params)


def finish(llm) -> dict[str, tuple[int, ...]]:
    done = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = tuple(output.outputs[0].token_ids)
    return done


@pytest.mark.parametrize("steps_before", [1, 5, 11])
def test_preemption_by_cache_reset(engines, core, steps_before):
    """Preempted requests restart their unfinished block and end with the tokens of an undisturbed run."""
    llm = engines(CHECKPOINT)
    requests = list(mixed_requests(12))
    undisturbed = tokens(llm, requests)
    add(llm, requests)
    done = {}
    for _ in range(steps_before):
        done |= {o.request_id: tuple(o.outputs[0].token_ids) for o in llm.llm_engine.step() if o.finished}
    running = len(core.scheduler.running)
    assert running > 0
    assert core.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(core.scheduler.running) == 0
    done |= finish(llm)
    assert [done[f"r{index}"] for index in range(12)] == undisturbed


@pytest.mark.parametrize("algorithm", ["low_confidence", "entropy"])
def test_preemption_keeps_what_filled_the_masks_of_the_prompt(engines, core, algorithm):
    """They are filled while the first block is; later ones read them, and vLLM hands back the prompt as it came."""
    llm, prompt = engines(CHECKPOINT), [5, 392, 7, 8, 392, 392, 9]
    params = SamplingParams(
        temperature=0,
        max_tokens=24,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_decoding": algorithm, "dlm_block_length": 4},
    )
    request = ({"prompt_token_ids": prompt}, params)
    (undisturbed,) = tokens(llm, [request])
    for steps_before in (9, 15):
        add(llm, [request])
        for _ in range(steps_before):
            llm.llm_engine.step()
        assert core.scheduler.running[0].num_output_tokens >= 4
        core.scheduler.reset_prefix_cache(reset_running_requests=True)
        assert finish(llm) == {"r0": undisturbed}


def test_abort_frees_and_spares_the_others(engines, core):
    llm = engines(CHECKPOINT)
    requests = list(mixed_requests(12))
    alone = tokens(llm, requests)
    before = free_blocks(core)
    add(llm, requests)
    for _ in range(3):
        llm.llm_engine.step()
    llm.llm_engine.abort_request([f"r{index}" for index in range(0, 12, 2)])
    done = finish(llm)
    for index in range(1, 12, 2):
        if f"r{index}" in done:  # the shortest may have finished within the three steps
            assert done[f"r{index}"] == alone[index]
    assert len(done) >= 4
    assert free_blocks(core) == before


def test_pause_and_resume(engines, core):
    from vllm.v1.core.sched.interface import PauseState

    llm = engines(CHECKPOINT)
    requests = list(mixed_requests(6))
    undisturbed = tokens(llm, requests)
    add(llm, requests)
    done = {o.request_id: tuple(o.outputs[0].token_ids) for o in llm.llm_engine.step() if o.finished}
    core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(3):
        assert not llm.llm_engine.step()
    core.scheduler.set_pause_state(PauseState.UNPAUSED)
    done |= finish(llm)
    assert [done[f"r{index}"] for index in range(6)] == undisturbed


def test_dummy_batches_change_nothing(engines, core):
    """vLLM runs them on idle data-parallel ranks of mixtures of experts."""
    llm = engines(CHECKPOINT)
    requests = list(mixed_requests(6))
    undisturbed = tokens(llm, requests)
    core.execute_dummy_batch()
    add(llm, requests)
    done = {}
    while llm.llm_engine.has_unfinished_requests():
        done |= {o.request_id: tuple(o.outputs[0].token_ids) for o in llm.llm_engine.step() if o.finished}
        core.execute_dummy_batch()
    assert [done[f"r{index}"] for index in range(6)] == undisturbed


def test_end_token_gives_the_tail_back(engines):
    """Generation ends at the first end token with nothing masked before it, a prefix of the whole canvas."""
    llm = engines(CHECKPOINT)
    prompt = {"prompt_token_ids": [390, 7, 8, 9, 10]}
    options = {"temperature": 0, "max_tokens": 40, "detokenize": False, "extra_args": {"dlm_block_length": 8}}
    whole = llm.generate(prompt, SamplingParams(ignore_eos=True, **options), use_tqdm=False)[0].outputs[0]
    assert len(whole.token_ids) == 40 and whole.finish_reason == "length"
    stop = whole.token_ids[19]
    where = list(whole.token_ids).index(stop)
    cut = llm.generate(prompt, SamplingParams(stop_token_ids=[stop], **options), use_tqdm=False)[0].outputs[0]
    assert list(cut.token_ids) == list(whole.token_ids)[: where + 1]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_canvas_is_cut_to_the_model_length(engines):
    llm = engines(CHECKPOINT)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    output = llm.generate({"prompt_token_ids": [5] * 240}, params, use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 16 and output.finish_reason == "length"


def test_logprobs_of_committed_tokens(engines):
    """Each is the log-softmax of its row in the step that committed it: greedy picks the most probable."""
    llm = engines(CHECKPOINT)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, detokenize=False)
    output = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)[0].outputs[0]
    assert len(output.logprobs) == 12
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        values = [item.logprob for item in entry.values()]
        assert len(entry) == 3 and entry[token].rank == 1 and entry[token].logprob == max(values) < 0


def test_distinct_samples_of_one_prompt(engines):
    llm = engines(CHECKPOINT)
    params = SamplingParams(temperature=1, max_tokens=16, n=4, seed=3, ignore_eos=True, detokenize=False)
    first, second = (
        [tuple(o.token_ids) for o in llm.generate({"prompt_token_ids": [5, 6]}, params, use_tqdm=False)[0].outputs]
        for _ in range(2)
    )
    assert len(set(first)) == 4
    assert first == second
