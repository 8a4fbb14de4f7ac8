"""A canvas with a text on both sides of it."""

import random

import numpy as np
import pytest
from vllm import SamplingParams

from tests.conftest import golden_tensors
from tests.engine.by_hand import most_probable_first
from tests.engine.running import tokens
from tests.engine.test_golden import OPTION

CHECKPOINTS = ["llada-tiny", "dream-tiny"]


def request(prompt, suffix, length: int, **options):
    params = SamplingParams(
        temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args={"dlm_suffix": suffix} | options
    )
    return {"prompt_token_ids": prompt}, params


def recorded_infill(golden_runs, mask: int):
    """Dream's reference fills holes wherever they are: the first run of them as a canvas, the rest behind it.
    -> the request, and what was recorded"""
    name = "dream.infill_entropy_s16_t0"
    params, recorded = golden_runs[name]["params"], golden_tensors(name)
    given, final = recorded["prompt"][0].tolist(), recorded["final"][0].tolist()
    given += [mask] * params["max_new_tokens"]
    holes = np.flatnonzero(np.array(given) == mask)
    start = int(holes[0])
    length = int(np.flatnonzero(np.diff(holes, append=len(given) + 1) > 1)[0]) + 1
    assert start > 0 and start + length < recorded["prompt"].shape[1]  # a hole inside the prompt
    options = {OPTION[key]: value for key, value in params.items() if key in OPTION}
    return request(given[:start], given[start + length :], length, **options), tuple(final[start : start + length])


def test_the_recorded_infill_run(engines, golden_runs):
    llm = engines("dream-tiny")
    asked, recorded = recorded_infill(golden_runs, llm.model_config.hf_config.mask_token_id)
    assert tokens(llm, [asked]) == [recorded]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("behind", [1, 17])
def test_as_by_hand(engines, checkpoint, behind):
    llm, rng = engines(checkpoint), random.Random(behind)
    mask = llm.model_config.hf_config.mask_token_id
    prompt, suffix = ([rng.randrange(390) for _ in range(count)] for count in (9, behind))
    asked = request(prompt, suffix, 12, dlm_decoding="low_confidence", dlm_block_length=6)
    canvas = prompt + [mask] * 12 + suffix
    want = most_probable_first(llm, canvas, (len(prompt), len(prompt) + 12), 6)
    assert tokens(llm, [asked]) == [tuple(want)]
    plain = {"prompt_token_ids": prompt}, SamplingParams(**{**vars_of(asked[1]), "extra_args": {}})
    assert tokens(llm, [plain]) != [tuple(want)]  # the suffix is read


def vars_of(params) -> dict:
    return {name: getattr(params, name) for name in ("temperature", "max_tokens", "ignore_eos", "detokenize")}


def test_what_is_counted(engines):
    """The suffix is given as the prompt is, and the answer is the canvas alone."""
    llm = engines("dream-tiny")
    prompt, params = request([5, 6, 7], [8, 9], 4)
    (output,) = llm.generate([prompt], [params], use_tqdm=False)
    assert output.prompt_token_ids == [5, 6, 7, 8, 9] and len(output.outputs[0].token_ids) == 4
    assert params.extra_args == {"dlm_suffix": [8, 9]}  # the caller's stay as they were
    (empty,) = llm.generate([prompt], [request([5, 6, 7], "", 4)[1]], use_tqdm=False)
    assert empty.prompt_token_ids == [5, 6, 7]


def test_samples_and_logprobs(engines):
    llm = engines("dream-tiny")
    params = SamplingParams(
        temperature=1.0, n=3, logprobs=2, seed=4, max_tokens=5, ignore_eos=True, extra_args={"dlm_suffix": " the end"}
    )
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], [params], use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    for one in output.outputs:
        assert all(token in found for token, found in zip(one.token_ids, one.logprobs, strict=True))


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        (3, "dlm_suffix: 3 is not valid, it must be str or a list of int"),
        (["a"], "dlm_suffix"),
        ([1, -1], "dlm_suffix: -1 is not supported: token ids must be between 0 and"),
        ([10**6], "dlm_suffix: 1000000 is not supported: token ids must be between 0 and"),
        ([7] * 253, "leaves no room for a canvas"),
        ([7] * 5000, "it has 5000 token ids, and the model's length is 256"),
    ],
)
def test_refused(engines, suffix, says):
    llm = engines("dream-tiny")
    prompt, params = request([5, 6, 7], suffix, 4)
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        llm.generate([prompt], [params], use_tqdm=False)


@pytest.mark.parametrize("checkpoint", ["llada2-tiny", "sdar-tiny"])
def test_models_that_know_blocks_refuse_it(engines, checkpoint):
    prompt, params = request([5, 6, 7], [8, 9], 4)
    with pytest.raises(ValueError, match=r"dlm_suffix.*a canvas block does not attend to later positions"):
        engines(checkpoint).generate([prompt], [params], use_tqdm=False)
