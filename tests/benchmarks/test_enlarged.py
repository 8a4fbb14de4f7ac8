"""The demo checkpoint in a larger model's shape: it says what it says by itself."""

import pytest
import torch
from vllm import SamplingParams

from benchmarks.lib import enlarged
from benchmarks.lib.models import DEMO as CHECKPOINT
from benchmarks.lib.models import SHAPES
from benchmarks.lib.workloads import recall_questions
from tests.engine.running import Recorder, tokens
from vllm_dlm.step.counts import ModelShape

SHAPE = SHAPES["toy-demo"]


@pytest.fixture(scope="module")
def both(engines, tmp_path_factory):
    enlarged.register(CHECKPOINT, SHAPE)
    folder = enlarged.folder_for(CHECKPOINT, SHAPE, tmp_path_factory.mktemp("enlarged"), 256)
    own = {"max_model_len": 256}
    return engines(str(CHECKPOINT), **own), engines(str(folder), load_format=enlarged.LOAD_FORMAT, **own)


@pytest.mark.parametrize("options", [{}, {"dlm_threshold": 0.9, "dlm_reuse": "fast_dllm/dual"}], ids=["one", "sure"])
def test_texts_and_logits_are_those_of_the_small_model(both, options):
    params = SamplingParams(
        temperature=0, max_tokens=32, ignore_eos=True, detokenize=False, extra_args={"dlm_block_length": 8} | options
    )
    asked = [({"prompt_token_ids": sample.prompt_ids}, params) for sample in recall_questions(3, 150, seed=5)]
    texts, steps = [], []
    for llm in both:
        with Recorder(llm) as recorder:
            texts.append(tokens(llm, asked))
        steps.append([one for request in sorted(recorder.steps) for one in recorder.steps[request]])
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    for (at, small), (there, large) in zip(*steps, strict=True):
        assert (at == there).all()
        torch.testing.assert_close(
            torch.from_numpy(large[:, : small.shape[1]]), torch.from_numpy(small), rtol=1e-3, atol=5e-3
        )
        assert large[:, small.shape[1] :].max() < small.min() - 50  # unused tokens


def test_every_weight_of_the_large_model_is_there_and_most_are_not_zero():
    zeros = whole = 0
    for _, tensor in enlarged.Enlarged(CHECKPOINT, SHAPE).weights(torch.device("cpu"), torch.bfloat16):
        zeros += int((tensor == 0).sum())
        whole += tensor.numel()
    assert whole > 5e6 and zeros < 0.8 * whole


@pytest.mark.parametrize(
    "model, said",
    [(ModelShape(6, 512, 8, 4, 64, 768, 1024), "n_kv_heads"), (ModelShape(6, 384, 8, 8, 48, 768, 1024), "wide")],
)
def test_shapes_that_cannot_hold_it_are_refused(model, said):
    with pytest.raises(ValueError, match=said):
        enlarged.Enlarged(CHECKPOINT, type(SHAPE)("other", "llada", model, 512))
