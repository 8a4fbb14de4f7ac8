"""Per-request `dlm_*` options over HTTP: each does what it says, and unlike requests share a batch."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest

from tests.integration.serving import (
    COPIED,
    COPY,
    NEEDLE_TOKENS,
    chat_text,
    needle,
    options,
)
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
    with pytest.raises(openai.BadRequestError, match=r"max_tokens.*leaves no room"):
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


# -- every method, and that it is the one that answers --------------------------------------


@pytest.mark.parametrize("algorithm", sorted(methods("decoding")))
def test_every_decoding_algorithm_can_be_asked_for(ask, algorithm):
    answer = ask(COPY, 8, extra=options(dlm_decoding=algorithm), seed=3)
    assert answer.choices[0].message.content == COPIED


@pytest.fixture
def denoised(complete, counted):
    """denoised(**options) -> what they may change: the steps, the tokens, how sure of each the step was that took it"""

    def denoised(**extra) -> tuple:
        body = {"ignore_eos": True} | options(**{"dlm_block_length": 16, "dlm_suppress_eos": 1} | extra)
        prompt = "What is the color of the boat?"
        answer, counts = counted(partial(complete, prompt, 16, body, logprobs=1, seed=3, temperature=0))
        logprobs = answer.choices[0].logprobs
        return counts["denoising_steps"], tuple(logprobs.tokens), tuple(round(p, 2) for p in logprobs.token_logprobs)

    return denoised


@pytest.mark.slow
def test_no_two_algorithms_denoise_alike(denoised):
    # Defaults of these may leave the order of one token a step as it is.
    more = {
        "credit": {"dlm_alpha": 10.0},
        "local_leap": {"dlm_tau": 0.1},
        "entropy_schedule": {"dlm_order_temperature": 5.0},
        "low_confidence_linear": {"dlm_steps": 6},
        "multi_block": {"dlm_open_length": 4},
        "sub_blocks": {"dlm_sub_block_length": 4},
    }
    seen = {name: denoised(dlm_decoding=name, **more.get(name, {})) for name in methods("decoding")}
    # freedave promises the texts of one token a step, and without a cache takes its steps, too
    assert seen.pop("freedave") == seen["low_confidence"]
    # and a share of each block is that of the canvas where there is one block
    assert seen.pop("low_confidence_static") == seen["low_confidence"]
    names = [[name for name, own in seen.items() if own == answer] for answer in set(seen.values())]
    assert not [alike for alike in names if len(alike) > 1]


#: id -> (what is asked, without and with the option)
CHANGED = {
    "threshold": ({}, {"dlm_threshold": 0.05}),
    "factor": ({}, {"dlm_factor": 4.0}),
    "guidance": ({}, {"dlm_cfg_scale": 2.0}),
    "eps": ({"dlm_decoding": "entropy", "dlm_steps": 6}, {"dlm_eps": 0.5}),
    "algorithm_temperature": ({"dlm_decoding": "entropy"}, {"dlm_algorithm_temperature": 5.0}),
    "top_p": ({"dlm_decoding": "entropy"}, {"dlm_top_p": 0.2}),
    "top_k": ({"dlm_decoding": "entropy"}, {"dlm_top_k": 2}),
    "end tokens last": ({"dlm_suppress_eos": 0}, {"dlm_confidence_eos_eot_inf": 1}),
}


@pytest.mark.parametrize(("asked", "option"), CHANGED.values(), ids=CHANGED)
def test_an_option_changes_the_denoising(denoised, asked, option):
    assert denoised(**asked | option) != denoised(**asked)


#: reuse -> (rows alive in 16 forwards over a canvas of so many rows, forwards that refreshed), by the papers' rules.
#: The response has two blocks of 8.
PUBLISHED = {
    "none": lambda rows: (16 * rows, 16),
    "fast_dllm": lambda rows: (2 * rows + 14 * 8, 2),
    "fast_dllm/prefix": lambda rows: (2 * rows + 7 * 16 + 7 * 8, 2),
    "dllm_cache": lambda rows: (rows + 15 * 16, 3),  # the prompt in the first forward, the response every seventh
    "dyllm": lambda rows: (5 * rows + 11 * 16, 5),  # everything in the first four and in the sixteenth
}


@pytest.mark.parametrize("reuse", PUBLISHED)
def test_rows_and_refreshes_are_those_of_the_policy(complete, counted, reuse):
    prompt = chat_text(needle(repeats=1)[0])
    answer, counts = counted(partial(complete, prompt, 16, {"ignore_eos": True} | options(dlm_reuse=reuse)))
    rows = answer.usage.prompt_tokens + 16
    assert counts["rows_dense"] == 16 * rows
    assert (counts["rows_live"], counts["refresh_steps"]) == PUBLISHED[reuse](rows)
    assert 0 < counts["rows_recomputed"] <= counts["rows_live"]


@pytest.mark.parametrize("reuse", sorted(methods("reuse")))
def test_every_reuse_can_be_asked_for(ask, counted, reuse):
    question, right = needle()
    answer, counts = counted(partial(ask, question, extra=options(dlm_reuse=reuse)))
    assert answer.choices[0].message.content == right
    assert (counts["rows_live"] < counts["rows_dense"]) == methods("reuse")[reuse].caches


# -- together --------------------------------------------------------------------------------


def test_requests_of_different_kinds_share_a_batch(ask, counted):
    """And each goes the way it goes alone."""
    scheduled = [
        options(dlm_steps=8),
        options(dlm_block_length=4),
        options(dlm_decoding="entropy", dlm_eps=0.01),
        options(dlm_decoding="topk_margin", dlm_block_length=16),
        *[options(dlm_reuse=name) for name in methods("reuse")],
        {},
    ]
    # how many steps these take depends on probabilities, which round differently in company
    adaptive = [
        options(dlm_threshold=0.9),
        options(dlm_factor=1.0),
        options(dlm_decoding="maskgit_plus", dlm_threshold=0.9),
    ]

    def answers(kinds: list[dict], at_once: int) -> None:
        pairs = [(needle("bob", f"{10007 + 3001 * i}", 1 + i % 4), kind) for i, kind in enumerate(kinds)]
        with ThreadPoolExecutor(at_once) as pool:
            jobs = [pool.submit(ask, question, extra=kind) for (question, _), kind in pairs]
            given = [job.result().choices[0].message.content for job in jobs]
        assert given == [answer for (_, answer), _ in pairs]

    _, alone = counted(partial(answers, scheduled, 1))
    _, together = counted(partial(answers, scheduled, len(scheduled)))
    del alone["rows_recomputed"], together["rows_recomputed"]  # some policies decide by values, which round, too
    assert together == alone
    answers(2 * [*scheduled, *adaptive], 2 * len(scheduled + adaptive))
