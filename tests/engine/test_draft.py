"""Canvases that start from a text: what the model gives least of it is written anew."""

import random
import re

import pytest
from vllm import SamplingParams

from tests.engine.by_hand import most_probable_first, probabilities
from tests.engine.running import core_of, tokens

CHECKPOINTS = ["llada-tiny", "dream-tiny"]


def request(prompt, draft, length: int, **options):
    extra = {"dlm_start": draft} | options
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra)
    return {"prompt_token_ids": prompt}, params


@pytest.mark.parametrize("behind", [0, 5])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_as_by_hand(engines, checkpoint, behind):
    """The least probable third becomes masks; so are what the canvas has beyond the draft. With a suffix, too."""
    llm, rng = engines(checkpoint), random.Random(1)
    config = llm.model_config.hf_config
    prompt, draft, suffix = ([rng.randrange(390) for _ in range(count)] for count in (9, 12, behind))
    asked = request(
        prompt, draft, 16, dlm_remask=1 / 3, dlm_suffix=suffix, dlm_decoding="low_confidence", dlm_block_length=8
    )
    canvas = prompt + draft + [config.mask_token_id] * 4 + suffix
    probs = probabilities(llm, canvas, config.logits_shift)
    of_draft = [float(probs[len(prompt) + index, token]) for index, token in enumerate(draft)]
    for index in sorted(range(12), key=of_draft.__getitem__)[:4]:
        canvas[len(prompt) + index] = config.mask_token_id
    want = most_probable_first(llm, canvas, (len(prompt), len(prompt) + 16), 8)
    assert tokens(llm, [asked]) == [tuple(want)]
    assert sum(a == b for a, b in zip(want, draft, strict=False)) >= 8


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_nothing_doubted_and_everything(engines, checkpoint):
    llm, rng = engines(checkpoint), random.Random(2)
    prompt, draft = ([rng.randrange(390) for _ in range(count)] for count in (9, 12))
    kept, anew, plain = (
        request(prompt, draft, 12, dlm_remask=0),
        request(prompt, draft, 12, dlm_remask=1),
        request(prompt, draft, 12),
    )
    del plain[1].extra_args["dlm_start"]
    same, other, without = tokens(llm, [kept, anew, plain])
    assert same == tuple(draft) and other == without


def test_a_draft_is_edited(engines):
    """`token_editing` changes what stands without masks."""
    llm, rng = engines("llada-tiny"), random.Random(3)
    prompt, draft = ([rng.randrange(390) for _ in range(count)] for count in (9, 12))
    edited = request(prompt, draft, 12, dlm_remask=0, dlm_decoding="token_editing", dlm_editing_threshold=0.0)
    assert tokens(llm, [edited]) != [tuple(draft)]


def test_logprobs_of_what_stays(engines):
    prompt, params = request([5, 6, 7], [8, 9, 10], 3, dlm_remask=0)
    params.logprobs = 1
    (output,) = engines("dream-tiny").generate([prompt], [params], use_tqdm=False)
    records = zip([8, 9, 10], output.outputs[0].logprobs, strict=True)
    assert all(record[token].logprob < 0 for token, record in records)


def test_logprobs_of_what_stays_survive_a_preemption(engines):
    """After the step that reads the draft, and in a later canvas block."""
    llm, rng = engines("dream-tiny"), random.Random(4)
    prompt, draft = ([rng.randrange(390) for _ in range(count)] for count in (9, 12))
    asked, params = request(prompt, draft, 14, dlm_remask=0.5, dlm_block_length=4)
    params.logprobs = 1
    (undisturbed,) = (output.outputs[0] for output in llm.generate([asked], [params], use_tqdm=False))
    wanted = [record[token].logprob for token, record in zip(undisturbed.token_ids, undisturbed.logprobs, strict=True)]
    assert max(wanted) < 0
    for steps in (1, 2, 5, 7):
        llm.llm_engine.add_request("r", asked, params)
        for _ in range(steps):
            llm.llm_engine.step()
        assert core_of(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
        (got,) = outputs[0].outputs
        assert got.token_ids == undisturbed.token_ids
        logprobs = [record[token].logprob for token, record in zip(got.token_ids, got.logprobs, strict=True)]
        assert logprobs == pytest.approx(wanted, abs=1e-4)  # same rows, cold start


def test_wino_judges_what_stays(engines):
    """With nothing made a mask, it takes back what it doubts; and it ends whatever becomes a mask at first."""
    llm, rng = engines("llada-tiny"), random.Random(5)
    prompt, draft = ([rng.randrange(390) for _ in range(count)] for count in (9, 48))
    for remask in (0, 0.05):
        judged = {"dlm_remask": remask, "dlm_decoding": "wino", "dlm_block_length": 48, "dlm_tau1": 0.02}
        (kept,) = tokens(llm, [request(prompt, draft, 48, dlm_tau2=0.0, **judged)])
        (anew,) = tokens(llm, [request(prompt, draft, 48, dlm_tau2=1.0, **judged)])
        assert sum(a != b for a, b in zip(anew, draft, strict=True)) > 10
        assert sum(a != b for a, b in zip(kept, draft, strict=True)) <= 3


REFUSED = {
    "a share": ({"dlm_start": [5], "dlm_remask": 1.5}, "dlm_remask: 1.5 is not valid, it must be between 0 and 1"),
    "words": ({"dlm_start": [5], "dlm_remask": "half"}, "dlm_remask: 'half' is not valid, it must be"),
    "no draft": ({"dlm_remask": 0.5}, "dlm_remask: 0.5 is not valid, it requires a starting text"),
    "no text": ({"dlm_start": 5}, "dlm_start: 5 is not valid, it must be str or a list of int"),
    "no token": ({"dlm_start": [10**6]}, "dlm_start: 1000000 is not supported: token ids must be between 0 and"),
    "too long": ({"dlm_start": [5] * 9}, "max_tokens: 8 is not supported: the starting text has 9 tokens"),
    "a window": ({"dlm_start": [5], "dlm_window": 3}, "a starting text requires dlm_extent full"),
    "a template": (
        {"dlm_start": [5], "dlm_template": "[[3]]"},
        "dlm_start: (5,) is not supported: a template already defines",
    ),
}


@pytest.mark.parametrize(("extra", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(engines, extra, says):
    params = SamplingParams(max_tokens=8, extra_args=extra)
    with pytest.raises(ValueError, match=re.escape(says)):
        engines("dream-tiny").generate([{"prompt_token_ids": [5]}], [params], use_tqdm=False)


@pytest.mark.parametrize("checkpoint", ["llada2-tiny", "sdar-tiny"])
def test_models_that_know_blocks_refuse_it(engines, checkpoint):
    with pytest.raises(ValueError, match=r"dlm_start.*a canvas block does not attend to later positions"):
        engines(checkpoint).generate([request([5], [6], 3)[0]], [request([5], [6], 3)[1]], use_tqdm=False)
