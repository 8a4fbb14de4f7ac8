"""Likelihoods of given continuations, against LLaDA's recorded one, a statement in float64, and the engine itself."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from vllm import SamplingParams

import vllm_dlm
from tests.conftest import GOLDEN
from tests.engine.drawn import drawn
from tests.engine.running import core_of, free_blocks, runner_of, tokens
from tests.engine.stated import stated
from tests.tiers import in_turn, pairwise
from vllm_dlm.families import FAMILIES
from vllm_dlm.options import OptionError, request_options, server_options
from vllm_dlm.options.limits import DEFAULT_LIMITS
from vllm_dlm.scoring.monte_carlo import draws
from vllm_dlm.scoring.scores import How, Pair, PairScore, jobs, resolved

CHECKPOINTS = sorted(path.name for path in (GOLDEN / "checkpoints").iterdir())
TIGHT = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 12}
FULL, BLOCKWISE = ["llada-tiny", "dream-tiny"], "sdar-tiny"


def pairs(count: int, seed: int = 0):
    rng = random.Random(seed)
    ids = [[rng.randrange(390) for _ in range(rng.randint(1, most))] for most in [60, 20] * count]
    return ids[::2], ids[1::2]


def test_the_recorded_likelihood(engines, golden_runs):
    """LLaDA's get_log_likelihood.py, draw for draw"""
    run = golden_runs["llada.loglik_seed0_mc32_bs8"]
    (got,) = vllm_dlm.score(engines("llada-tiny"), run["prompt"], run["answer"], mc_num=32, batch_size=8, seed=0)
    assert abs(got.logprob - run["value"]) < 1e-4
    assert (got.method, got.seed, got.num_tokens, got.token_logprobs) == ("monte_carlo", 0, 5, None)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
@pytest.mark.parametrize("checkpoint", FULL)
def test_monte_carlo(engines, checkpoint, cfg_scale):
    contexts, answers = pairs(3)
    got = vllm_dlm.score(engines(checkpoint), contexts, answers, mc_num=8, batch_size=4, seed=5, cfg_scale=cfg_scale)
    for score, context, answer in zip(got, contexts, answers, strict=True):
        masks = [masked.tolist() for masked in draws(len(answer), 8, 4, 5)]
        assert abs(score.logprob - stated(checkpoint).monte_carlo(context, answer, masks, cfg_scale)) < 2e-3


@pytest.mark.parametrize("checkpoint, steps, cfg_scale", pairwise([*FULL, BLOCKWISE], [1, 2, 3, 1000], [0.0, 0.5]))
def test_blocks(engines, checkpoint, steps, cfg_scale):
    contexts, answers = pairs(4, seed=1)
    got = vllm_dlm.score(engines(checkpoint), contexts, answers, method="blocks", steps=steps, cfg_scale=cfg_scale)
    for score, context, answer in zip(got, contexts, answers, strict=True):
        wanted, best = stated(checkpoint).blocks(context, answer, steps, cfg_scale)
        np.testing.assert_allclose(score.token_logprobs, wanted, atol=2e-4)
        assert score.logprob == sum(score.token_logprobs) and score.is_greedy == all(best)
        assert score.token_ids == answer and score.num_tokens == len(answer)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_what_a_model_writes_is_scored_as_it_was_written(engines, checkpoint):
    """From the left, one token a step: the log-probabilities of generation, all of them of the best token."""
    llm, (contexts, _) = engines(checkpoint), pairs(6, seed=2)
    mask_id = runner_of(llm).model_config.hf_config.mask_token_id
    extra = {"dlm_decoding": "sequential", "dlm_threshold": "none"}
    if FAMILIES[runner_of(llm).model_config.architecture].attention == "full":
        extra["dlm_block_length"] = "none"
    params = SamplingParams(
        temperature=0, max_tokens=13, ignore_eos=True, logprobs=0, detokenize=False, extra_args=extra
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in contexts], params, use_tqdm=False)
    written = [output.outputs[0] for output in outputs]
    answers = [list(one.token_ids) for one in written]
    assert not any(mask_id in answer for answer in answers)
    for score, one in zip(vllm_dlm.score(llm, contexts, answers, method="blocks", steps=1000), written, strict=True):
        assert score.is_greedy
        own = [found[token].logprob for found, token in zip(one.logprobs, one.token_ids, strict=True)]
        np.testing.assert_allclose(score.token_logprobs, own, atol=1e-5)
    wrong = [[*answer[:4], (answer[4] + 1) % 390, *answer[5:]] for answer in answers]
    assert not any(score.is_greedy for score in vllm_dlm.score(llm, contexts, wrong, method="blocks", steps=1000))


@pytest.mark.parametrize("checkpoint, settings", in_turn([BLOCKWISE, *FULL], [{}, TIGHT]))
def test_beside_requests_that_generate(engines, checkpoint, settings):
    """Both are what they are alone: the same tokens, and the same scores as far as float32 goes. With little memory
    and a small budget, too, where some of them wait."""
    llm = engines(checkpoint, **settings)
    contexts, answers = pairs(8, seed=3)
    how = How(method="blocks", steps=2) if checkpoint == BLOCKWISE else How(mc_num=4, seed=1)
    attention = "block_causal" if checkpoint == BLOCKWISE else "full"
    method = resolved(how, attention)
    scores = [PairScore(Pair(context, answer), method) for context, answer in zip(contexts, answers, strict=True)]
    asked = [({"prompt_token_ids": score.pair.context}, params) for score, _, params in jobs(scores)]
    writing = drawn(llm, 10, checkpoint, dlm_reuse="none", dlm_template=None)
    both = [*writing, *asked]
    random.Random(4).shuffle(both)
    alone = [scored(llm, [request])[0] for request in both]
    for cache in runner_of(llm).kv_caches:
        cache.fill_(torch.nan)
    for got, want in zip(scored(llm, both), alone, strict=True):
        assert got[0] == want[0]
        np.testing.assert_allclose(got[1], want[1], atol=1e-4)
    core = core_of(llm)
    assert free_blocks(core) == core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


def scored(llm, given):
    """(tokens of each sample, log-probabilities if there are some) of each request"""
    prompts, params = zip(*given, strict=True)
    found = []
    for output in llm.generate(list(prompts), list(params), use_tqdm=False):
        records = [record for sample in output.outputs for record in sample.logprobs or ()]
        values = [next(iter(record.values())).logprob for record in records]
        tokens = [tuple(sample.token_ids) for sample in output.outputs]
        found.append((tokens, [value for value in values if np.isfinite(value)]))
    return found


def test_in_half_precision(engines):
    """bfloat16 rounds to 1 in 256, and logits here are of size 10: who shares the batch may move a token by one
    rounding of its logit, 0.06. A whole score stays within some percent of float32's."""
    contexts, answers = pairs(6, seed=6)
    exact = vllm_dlm.score(engines("llada-tiny"), contexts, answers, method="blocks")
    half = engines("llada-tiny", dtype="bfloat16")
    together = vllm_dlm.score(half, contexts, answers, method="blocks")
    for score, wanted, context, answer in zip(together, exact, contexts, answers, strict=True):
        (alone,) = vllm_dlm.score(half, context, answer, method="blocks")
        np.testing.assert_allclose(score.token_logprobs, alone.token_logprobs, atol=0.15)
        assert score.logprob == pytest.approx(wanted.logprob, rel=0.03)


def test_a_policy_of_the_server_changes_no_score(engines):
    """Reuse, selections and extents are of generation: a score is the exact model's."""
    dlm = {
        "decoding": {"name": "low_confidence", "threshold": 0.9, "suppress_eos": True},
        "reuse": {"name": "fast_dllm", "cache": "dual"},
        "extent": {"name": "window", "window": 8},
    }
    contexts, answers = pairs(4, seed=7)
    plain, busy = engines("llada-tiny"), engines("llada-tiny", additional_config={"dlm": dlm})
    for how in ({"method": "blocks", "steps": 3}, {"mc_num": 16, "seed": 0}):
        one, other = (vllm_dlm.score(llm, contexts, answers, **how) for llm in (plain, busy))
        assert [score.logprob for score in one] == pytest.approx([score.logprob for score in other], abs=1e-4)


def test_alone_or_in_a_list_draws_are_those_of_the_seed(engines):
    llm, (contexts, answers) = engines("llada-tiny"), pairs(5, seed=8)
    together = vllm_dlm.score(llm, contexts, answers, mc_num=16, seed=9)
    for score, context, answer in zip(together, contexts, answers, strict=True):
        (alone,) = vllm_dlm.score(llm, context, answer, mc_num=16, seed=9)
        assert alone.logprob == pytest.approx(score.logprob, abs=1e-4)
    unseeded = [vllm_dlm.score(llm, contexts[0], answers[0], mc_num=16)[0] for _ in range(2)]
    assert unseeded[0].seed != unseeded[1].seed
    (again,) = vllm_dlm.score(llm, contexts[0], answers[0], mc_num=16, seed=unseeded[0].seed)
    assert again.logprob == pytest.approx(unseeded[0].logprob, abs=1e-4)


def test_draws():
    """The number of masks is spread evenly over a batch of draws."""

    def drawn(*how):
        return [tuple(masked.tolist()) for masked in draws(*how)]

    assert len(drawn(10, 64, 16, 0)) == 64 and all(mask == tuple(sorted(set(mask))) for mask in drawn(10, 64, 16, 0))
    sizes = sorted(map(len, drawn(10, 64, 16, 0)))
    assert sizes[0] == 1 and sizes[-1] == 10 and {sizes.count(size) for size in range(1, 11)} <= {4, 5, 6, 7, 8}
    assert drawn(1, 128, 16, 3) == [(0,)] * 128 and drawn(10, 64, 16, 1) != drawn(10, 64, 16, 0)


def test_equal_draws_are_one_forward():
    wanted = Counter(tuple(masked.tolist()) for masked in draws(4, 64, 16, 3))
    score = PairScore(Pair([1], [5, 6, 7, 8]), resolved(How(mc_num=64, seed=3), "full"))
    assert [forward.masked for forward in score.forwards()] == list(wanted)
    assert list(score.counts.values()) == list(wanted.values())


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, context, continuation, how",
    [
        ("continuation", [1], [], {}),
        ("context", [], [1], {}),
        ("context", [1, 392], [1], {}),  # a mask
        ("continuation", [1], [392], {}),
        ("continuation", [1], [512], {}),
        ("context", [-1], [5], {}),
        ("context and continuation", [1] * 200, [1] * 57, {}),
        ("continuation", [1], [True], {}),
        ("continuation", [1], 5, {}),
        ("continuation", [[1], [2], [3]], [[1], [2]], {}),
        ("mc_num", [1], [1], {"mc_num": 0}),
        ("mc_num", [1], [1], {"mc_num": 20}),
        ("batch_size", [1], [1], {"batch_size": 0}),
        ("mc_num", [1], [1], {"method": "blocks", "mc_num": 16}),
        ("steps", [1], [1], {"steps": 2, "mc_num": 16}),
        ("steps", [1], [1], {"steps": 0}),
        ("cfg_scale", [1], [1], {"cfg_scale": float("nan")}),
        ("method", [1], [1], {"method": "rolling"}),
        ("seed", [1], [1], {"seed": -1}),
        ("temperature", [1], [1], {"temperature": 1.0}),
        ("priority", [1], [1], {"priority": 1 << 63}),
        ("context and continuation", [1] * (1 << 20), [1], {}),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(engines, field, context, continuation, how):
    with pytest.raises(ValueError, match=rf"(?m)^{field}\b"):
        vllm_dlm.score(engines("llada-tiny"), context, continuation, **how)


def test_the_limits_of_a_server_are_none_of_an_llm(engines):
    pairs = 1 + DEFAULT_LIMITS.score_draws // 128  # more than a server takes with the default mc_num, and of draws
    scores = vllm_dlm.score(engines("llada-tiny"), [1, 2], [[3]] * pairs, seed=0)
    assert len(scores) == pairs and len({score.logprob for score in scores}) == 1


def test_monte_carlo_is_of_models_that_see_the_whole_canvas(engines):
    with pytest.raises(OptionError, match=r"^method: 'monte_carlo' .* the method must be 'blocks'"):
        vllm_dlm.score(engines(BLOCKWISE), [1, 2], [3], method="monte_carlo")
    with pytest.raises(OptionError, match=r"^method: "):
        vllm_dlm.score(engines(BLOCKWISE), [1, 2], [3], mc_num=16)


@pytest.mark.parametrize(
    "extra, prompt, max_tokens",
    [
        ({"dlm_score": [1, 2]}, [5, 6], 2),
        ({"dlm_score": {"start": 2}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": []}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, "4"]}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4], "more": 1}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4], "masked": [1, 0]}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4], "masked": [2]}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4], "masked": []}}, [5, 6], 2),
        ({"dlm_score": {"start": 3, "answer": [3, 4]}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4]}}, [5, 6], 3),
        ({"dlm_score": {"start": 2, "answer": [3, 392]}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 512]}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, -1]}}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4]}}, [5, 392], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4]}, "dlm_threshold": 0.9}, [5, 6], 2),
        ({"dlm_score": {"start": 2, "answer": [3, 4]}, "dlm_steps": 0}, [5, 6], 2),
        ({"dlm_score": {"start": 255, "answer": [3, 4]}}, [5] * 255, 2),
    ],
)
@pytest.mark.parametrize("checkpoint", ["llada-tiny", BLOCKWISE])
def test_nothing_in_dlm_score_reaches_the_engine_unchecked(engines, checkpoint, extra, prompt, max_tokens):
    if checkpoint == BLOCKWISE:  # its mask is another one
        extra = {
            key: {k: [509 if t == 392 else t for t in v] if k == "answer" else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in extra.items()
        }
        prompt = [509 if token == 392 else token for token in prompt]
    llm = engines(checkpoint)
    params = SamplingParams(max_tokens=max_tokens, detokenize=False, ignore_eos=True, extra_args=extra)
    with pytest.raises(ValueError, match=r"^(dlm_|prompt)"):
        tokens(llm, [({"prompt_token_ids": prompt}, params)])
    plain = SamplingParams(max_tokens=2, detokenize=False, ignore_eos=True)
    assert len(tokens(llm, [({"prompt_token_ids": [5, 6]}, plain)])[0]) == 2


def test_a_score_is_no_method_of_generation():
    server = server_options(None, "low_confidence")
    with pytest.raises(OptionError, match=r"^dlm_decoding: 'score' is unknown"):
        request_options(server, {"dlm_decoding": "score"})
