"""Per-request `dlm_*` options over HTTP: each does what it says, and unlike requests share a batch."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest

from tests.integration.serving import COPIED, COPY, NEEDLE_TOKENS, chat_text, needle, options
from vllm_dlm.methods import methods

EOS = 1  # of the bundled checkpoint, as is the padding behind an answer


def test_steps_are_the_requests_own(complete, counted):
    """`vllm:diffusion_num_denoising_steps` has one more per block, vLLM's step that commits it."""
    prompt, ends = chat_text(COPY), {"ignore_eos": True}
    rows = complete(prompt, 1).usage.prompt_tokens + 16
    for extra, forwards, blocks in [
        ({}, 16, 2),
        (options(dlm_steps=4), 4, 2),
        (options(dlm_block_length=16, dlm_steps=5), 5, 1),
        (options(dlm_block_length=5), 16, 4),
    ]:
        answer, counts = counted(partial(complete, prompt, 16, ends | extra))
        assert counts["committed_tokens"] == answer.usage.completion_tokens == 16
        assert counts["denoising_steps"] == forwards + blocks
        assert counts["rows_dense"] == forwards * rows


def test_a_threshold_takes_fewer_steps_to_the_same_answer(ask, counted):
    question, answer = needle()
    forwards = {}
    for threshold in ("none", 0.5):  # without one, a step fills one position
        chat, counts = counted(partial(ask, question, extra=options(dlm_threshold=threshold)))
        assert chat.choices[0].message.content == answer
        forwards[threshold] = counts["denoising_steps"] - 2  # the blocks of this answer
    assert forwards["none"] >= NEEDLE_TOKENS > forwards[0.5]


def test_typed_masks_take_no_steps(complete, counted, server):
    """With a threshold that nothing reaches, every hole would take one."""
    mask, extra = "<|mdm_mask|>", {"ignore_eos": True} | options(dlm_threshold=1.0)
    for prompt in (f"Copy: {mask * 20} a", f"{mask} a"):
        answer, counts = counted(partial(complete, prompt, 1, extra))
        assert counts["denoising_steps"] == 1 + 1  # and the commit
        assert counts["rows_dense"] == answer.usage.prompt_tokens + 1
    extra["vllm_xargs"] |= {"dlm_infill": 1}
    _, holes = counted(partial(complete, f"Copy: {mask * 20} a", 1, extra))
    assert holes["denoising_steps"] > 2
    with pytest.raises(openai.BadRequestError, match="max_tokens.*leaves no room"):
        complete(mask * 500, 1)


def test_guidance_doubles_the_rows(complete, counted):
    prompt, extra = chat_text(COPY), {"ignore_eos": True}
    _, plain = counted(partial(complete, prompt, 8, extra))
    _, guided = counted(partial(complete, prompt, 8, extra | options(dlm_cfg_scale=0.5)))
    assert guided["rows_dense"] == 2 * plain["rows_dense"]
    assert guided["denoising_steps"] == plain["denoising_steps"]


@pytest.mark.parametrize("true", [True, 1])
def test_booleans_may_be_0_and_1(complete, true):
    extra = {"ignore_eos": True, "return_token_ids": True}
    padded = complete(chat_text(COPY), extra=extra).choices[0].token_ids
    suppressed = complete(chat_text(COPY), extra=extra | options(dlm_suppress_eos=true)).choices[0].token_ids
    unchanged = complete(chat_text(COPY), extra=extra | options(dlm_suppress_eos=0)).choices[0].token_ids
    assert EOS in padded and EOS not in suppressed and unchanged == padded


@pytest.mark.parametrize("algorithm", sorted(methods("decoding")))
def test_every_decoding_algorithm_can_be_asked_for(ask, algorithm):
    answer = ask(COPY, 8, extra=options(dlm_algorithm=algorithm), seed=3)
    assert answer.choices[0].message.content == COPIED


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in ("reuse", "selection") for name in methods(kind)])
def test_every_reuse_and_selection_can_be_asked_for(ask, kind, name):
    question, answer = needle()
    assert ask(question, extra=options(**{f"dlm_{kind}": name})).choices[0].message.content == answer


def test_requests_of_different_kinds_share_a_batch(ask):
    kinds = [
        options(dlm_steps=8),
        options(dlm_block_length=4),
        options(dlm_algorithm="entropy", dlm_eps=0.01),
        options(dlm_algorithm="topk_margin", dlm_block_length=16),
        options(dlm_threshold=0.9),
        options(dlm_factor=1.0),
        options(dlm_algorithm="maskgit_plus", dlm_threshold=0.9),
        *[options(dlm_reuse=name) for name in methods("reuse")],
        {},
    ]
    pairs = [(needle("bob", f"{10007 + 3001 * i}", 1 + i % 4), kind) for i, kind in enumerate(kinds * 2)]
    with ThreadPoolExecutor(len(pairs)) as pool:
        jobs = [pool.submit(ask, question, extra=kind) for (question, _), kind in pairs]
        answers = [job.result().choices[0].message.content for job in jobs]
    assert answers == [answer for (_, answer), _ in pairs]
