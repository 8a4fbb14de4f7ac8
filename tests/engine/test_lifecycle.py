"""What happens to requests between their first and their last step."""

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.interface import PauseState

from tests.engine.drawn import drawn
from tests.engine.running import all_blocks_are_free, answers, core_of, interrupted, stepped

CHECKPOINT = "llada-tiny"


@pytest.mark.parametrize("algorithm", ["low_confidence", "entropy"])
def test_preemption_keeps_what_filled_the_masks_of_the_prompt(engines, algorithm):
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
    undisturbed = answers(llm, [request])
    for steps in (9, 15):
        assert interrupted(llm, [request], steps) == undisturbed


def test_abort_frees_and_spares_the_others(engines):
    llm = engines(CHECKPOINT)
    requests = drawn(llm, 12, "abort")
    alone = answers(llm, requests)

    def abort(step):
        if step == 3:
            llm.llm_engine.abort_request([str(index) for index in range(0, 12, 2)])

    done = stepped(llm, requests, abort)
    assert 6 <= len(done) < 12  # the shortest may have finished within the three steps
    assert all(answer == alone[index] for index, answer in done.items())
    assert all_blocks_are_free(llm)


def test_pause_and_resume(engines):
    llm = engines(CHECKPOINT)
    requests, scheduler = drawn(llm, 6, "pause"), core_of(llm).scheduler
    undisturbed = answers(llm, requests)

    def pause(step):
        if step == 1:
            scheduler.set_pause_state(PauseState.PAUSED_ALL)
            assert not any(llm.llm_engine.step() for _ in range(3))
            scheduler.set_pause_state(PauseState.UNPAUSED)

    assert stepped(llm, requests, pause) == dict(enumerate(undisturbed))


def test_dummy_batches_change_nothing(engines):
    """vLLM runs them on idle data-parallel ranks of mixtures of experts."""
    llm = engines(CHECKPOINT)
    requests = drawn(llm, 6, "dummies")
    undisturbed = answers(llm, requests)
    assert stepped(llm, requests, lambda step: core_of(llm).execute_dummy_batch()) == dict(enumerate(undisturbed))


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
