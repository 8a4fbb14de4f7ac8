"""Dream's top_p and top_k at temperature 0: they change the order in which positions are filled."""

import pytest
import torch
from vllm import SamplingParams

from tests.engine.worker_calls import logits_of
from vllm_dlm.plugins.decoding.entropy import Entropy

MASK, LENGTH = 397, 16
PROMPT = [396, 17, 250, 31, 8, 101, 77, 5]


def plain_filter(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Dream's, row by row: tokens up to the one that crosses top_p, then the top_k best of them."""
    out = torch.full_like(logits, torch.finfo(logits.dtype).min)
    for row, kept in zip(logits, out, strict=True):
        order = row.argsort(descending=True)
        mass = row.softmax(-1)[order].cumsum(0)
        nucleus = order[: int((mass <= top_p).sum()) + 1][: top_k or None]
        kept[nucleus] = row[nucleus]
    return out


def confidence(algorithm: str, probabilities: torch.Tensor) -> torch.Tensor:
    first, second = probabilities.topk(2).values.unbind(-1)
    entropy = -(probabilities * (probabilities + 1e-10).log()).sum(-1)
    return {"maskgit_plus": first, "topk_margin": first - second, "entropy": -entropy}[algorithm]


def reference(llm, algorithm: str, top_p: float, top_k: int) -> tuple[list[int], list[int]]:
    """Dream's loop, one canvas: (tokens, the order in which positions were filled)."""
    canvas, order = torch.tensor(PROMPT + [MASK] * LENGTH), []
    for quota in Entropy().quotas(LENGTH, LENGTH):
        masked = (canvas == MASK).nonzero()[:, 0]
        ((logits,),) = llm.collective_rpc(logits_of, args=([canvas.tolist()],))
        probabilities = plain_filter(logits[masked - 1].float(), top_p, top_k).softmax(-1)
        chosen = confidence(algorithm, probabilities).sort(descending=True, stable=True).indices[:quota]
        probabilities[:, MASK] = 0
        canvas[masked[chosen]] = probabilities[chosen].argmax(-1)
        order += masked[chosen].tolist()
    return canvas[len(PROMPT) :].tolist(), order


@pytest.mark.parametrize("algorithm", ["entropy", "maskgit_plus", "topk_margin"])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (1.0, 5), (0.7, 8)])
def test_the_order_is_that_of_the_filtered_confidence(engines, algorithm, top_p, top_k):
    llm = engines("dream-tiny")
    options = {"dlm_decoding": algorithm, "dlm_top_p": top_p, "dlm_top_k": top_k}
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, extra_args=options)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    wanted, order = reference(llm, algorithm, top_p, top_k)
    assert output.outputs[0].token_ids == wanted
    assert order != reference(llm, algorithm, 1.0, 0)[1], "nothing was filtered: the test says nothing"


def test_one_token_in_the_nucleus_is_certain(engines):
    """With top_k 1 every confidence is 1, so that a threshold of 1 is reached everywhere at once."""
    llm = engines("dream-tiny")
    given = {"dlm_threshold": 1.0, "dlm_top_k": 1}
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, extra_args=given)
    llm.llm_engine.add_request("r", {"prompt_token_ids": PROMPT}, params)
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        steps += 1
    assert steps == 1
