"""Models whose attention knows blocks: recorded runs of SDAR's official code, and what holds for all of them."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.matrix import assert_answers_are_those_alone
from tests.engine.running import Rows, Watching, core_of, poison, tokens
from tests.tiers import slow
from vllm_dlm.kernels.rotary_write import rotate
from vllm_dlm.methods import methods
from vllm_dlm.models.rope import RotaryTable, halves
from vllm_dlm.options import OptionError, server_options
from vllm_dlm.plugins.decoding.base import Proposal, Turn
from vllm_dlm.plugins.decoding.roles import RandomOrder, ShadowingDecoding

RUNS = json.loads((GOLDEN / "block/runs.json").read_text())
SDAR, LLADA2 = "sdar-tiny", "llada2-tiny"


def recorded(name: str):
    return load_file(GOLDEN / "block/runs" / f"{name}.safetensors")


class Blocks(Watching):
    """What each step was fed: the block of the one request that is being filled."""

    def __enter__(self):
        self.steps = []
        return super().__enter__()

    def step_begins(self, states):
        (state,) = states
        canvas = state.canvas
        start, end = canvas.plan.live[-1] + 1 - canvas.options.decoding.block_length, canvas.plan.live[-1] + 1
        self.steps.append((int(start), canvas.tokens[start:end].tolist()))


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(("sdar", "llada20"))])
def test_recorded_run(engines, name):
    assert_recorded_run(engines(RUNS[name]["ckpt"]), name)


def assert_recorded_run(llm, name: str) -> None:
    """Token for token, and step for step what the block was; no step is made to commit a block."""
    run, arrays = RUNS[name], recorded(name)
    extra = {
        "dlm_decoding": "low_confidence_dynamic",
        "dlm_steps": run["steps"],
        "dlm_block_length": run["B"],
        "dlm_threshold": "none" if run["threshold"] > 1 else run["threshold"],
    }
    ends = name.startswith("llada20")  # SDAR's loop was told of none
    params = SamplingParams(
        temperature=0,
        max_tokens=run["G"],
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        stop_token_ids=[run["eos"]] if ends else None,
    )
    with Blocks(llm) as blocks:
        (got,) = tokens(llm, [({"prompt_token_ids": arrays["prompt"].tolist()}, params)])
    assert list(got) == arrays["answer"].tolist()
    fed = [[(p, t) for p, t in enumerate(step) if t >= 0][-run["B"] :] for step in arrays["canvas"].tolist()]
    fed = [(step[0][0], [t for _, t in step]) for step in fed]
    # LLaDA2.0's loop finishes a block whose end is known, which has no effect on the answer
    assert blocks.steps == fed[: len(blocks.steps)]
    assert len(blocks.steps) == run.get("denoise", run["forwards"]) or got[-1] == run["eos"]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("llada21")])
def test_recorded_run_with_edits(engines, name):
    run, arrays = RUNS[name], recorded(name)
    extra = {
        "dlm_decoding": "token_editing",
        "dlm_block_length": run["B"],
        "dlm_threshold": run["threshold"],
        "dlm_editing_threshold": run["editing_threshold"],
        "dlm_max_post_steps": run["max_post_steps"],
    }
    params = SamplingParams(
        temperature=0,
        max_tokens=run["G"],
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        stop_token_ids=[run["eos"]],
    )
    llm = engines(run["ckpt"])
    with Blocks(llm) as blocks:
        (got,) = tokens(llm, [({"prompt_token_ids": arrays["prompt"].tolist()}, params)])
    assert list(got) == arrays["answer"].tolist()
    fed = [[(p, t) for p, t in enumerate(step) if t >= 0][-run["B"] :] for step in arrays["canvas"].tolist()]
    assert blocks.steps == [(step[0][0], [t for _, t in step]) for step in fed]


def allowed(name: str) -> bool:
    return not issubclass(methods("decoding")[name], ShadowingDecoding)


def mixed(count: int, most: int = 40):
    """Every decoding that goes with such models; widths of blocks that divide nothing, too."""
    rng = random.Random(5)
    names = sorted(filter(allowed, methods("decoding")))
    for index in range(count):
        extra = {"dlm_decoding": names[index % len(names)], "dlm_block_length": rng.choice([4, 4, 8, 16, 5, 7])}
        if index % 5 == 2:
            extra["dlm_cfg_scale"] = 0.7
        if issubclass(methods("decoding")[extra["dlm_decoding"]], RandomOrder):
            extra["dlm_threshold"] = "none"  # which servers may have
        elif index % 4 == 1:
            extra["dlm_threshold"] = 0.05
        params = SamplingParams(
            temperature=0.8 * (index % 3 == 0),
            seed=index,
            max_tokens=rng.randint(1, most),
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield (
            {"prompt_token_ids": [rng.randrange(390) for _ in range(rng.choice([1, 3, 4, 16, rng.randint(1, 120)]))]},
            params,
        )


@pytest.mark.parametrize("chunk", [16, *slow(1, 30)])
def test_long_prompts_are_read_in_several_steps(engines, monkeypatch, chunk):
    """Which fill nothing, and count as none of the first block's; whoever else takes part."""
    llm, given = engines(SDAR), list(mixed(30, 12))
    with Rows(llm) as whole:
        wanted = tokens(llm, given)
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", chunk)
    poison(llm)
    with Rows(llm) as parts:
        assert tokens(llm, given) == wanted
    widest = max(params.extra_args["dlm_block_length"] for _, params in given)
    assert max(parts.live) <= max(chunk, widest) + widest < max(whole.live) and len(parts.live) > len(whole.live)
    assert [tokens(llm, [request]) for request in given] == [[got] for got in wanted]


def test_memory_grows_by_blocks(engines):
    """A bound of two hundred tokens costs what has been reached of it."""
    llm = engines(SDAR, block_size=16)
    core, held = core_of(llm), []

    class Held(Watching):
        def step_begins(self, states):
            (state,) = states
            blocks = core.scheduler.kv_cache_manager.get_block_ids(state.req_id)[0]
            held.append((len(blocks), -(-state.canvas.rows // 16), len(state.canvas.plan.live)))

    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    with Held(llm):
        tokens(llm, [({"prompt_token_ids": list(range(30))}, params)])
    assert all(got == wanted for got, wanted, _ in held) and held[0][0] == 2 and held[-1][0] == 15
    # the prompt's whole blocks once, then the block alone or with the one before it
    assert held[0][2] == 32 and {rows for _, _, rows in held[1:]} == {4, 8}


@pytest.mark.parametrize(
    "field, extra",
    [
        ("dlm_reuse", {"dlm_reuse": "fast_dllm"}),
        ("dlm_extent", {"dlm_extent": "window"}),
        ("dlm_extent", {"dlm_window": 3}),
        ("dlm_decoding", {"dlm_decoding": "wino"}),
        ("dlm_block_length", {"dlm_block_length": "none"}),
    ],
)
def test_what_is_of_other_models_is_refused_by_name(engines, field, extra):
    params = SamplingParams(max_tokens=8, extra_args=extra, detokenize=False)
    with pytest.raises(ValueError, match=f"^{field}: "):
        tokens(engines(SDAR), [({"prompt_token_ids": [1, 2]}, params)])


def test_masks_of_a_prompt_are_refused(engines):
    params = SamplingParams(max_tokens=8, detokenize=False)
    with pytest.raises(ValueError, match="cannot fill masks"):
        tokens(engines(SDAR), [({"prompt_token_ids": [1, 509, 2]}, params)])


@pytest.mark.parametrize("part", ["reuse", "extent"])
def test_servers_are_refused_what_is_of_other_models(part):
    name = {"reuse": "dyllm", "extent": "window"}[part]
    with pytest.raises(OptionError, match=f"^dlm.{part}: '{name}' "):
        server_options({part: {"name": name}}, "low_confidence_static", attention="block_causal", block_length=4)


def test_an_end_in_a_finished_block_ends_the_answer(engines):
    llm, prompt = engines(SDAR), {"prompt_token_ids": list(range(20, 33))}
    whole = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    (all_,) = tokens(llm, [(prompt, whole)])
    end = all_[9]
    stopped = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[end], detokenize=False, ignore_eos=True)
    assert tokens(llm, [(prompt, stopped)]) == [all_[: all_.index(end) + 1]]


def test_blocks_lie_at_multiples_of_their_width():
    options = server_options(None, "low_confidence_static", attention="block_causal", block_length=4)
    assert options.canvas_length(13, 7, 256) == 20 and options.canvas_length(13, 8, 256) == 24
    assert options.blocks(13, 20) == [(0, 3), (3, 7)] and options.blocks(12, 20) == [(0, 4), (4, 8)]
    assert options.canvas_length(250, 100, 255) == 255  # the model's length is no multiple


@pytest.mark.parametrize("checkpoint, guided", [(SDAR, True), *slow((SDAR, False), (LLADA2, False), (LLADA2, True))])
def test_the_model_s_length_ends_in_a_block(engines, checkpoint, guided):
    """Prompts that leave one position or more, end inside a block or not: each request ends with "length", with all the
    tokens that there is room for, and with the tokens it gets alone."""
    llm, given = engines(checkpoint, max_model_len=101), []
    for index, (width, prompt) in enumerate(
        [(width, prompt) for width in (32, 24, 7, 5, 4) for prompt in (100, 99, 90, 64)]
    ):
        extra = {"dlm_block_length": width} | ({"dlm_cfg_scale": 0.5} if guided else {})
        room = 101 - prompt
        params = SamplingParams(
            temperature=0,
            max_tokens=[room, 1, max(room - 1, 1)][index % 3],
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        given.append(({"prompt_token_ids": [7 + (index * token) % 300 for token in range(prompt)]}, params))
    prompts, params = zip(*given, strict=True)
    outputs = [output.outputs[0] for output in llm.generate(list(prompts), list(params), use_tqdm=False)]
    assert {output.finish_reason for output in outputs} == {"length"}
    assert [len(output.token_ids) for output in outputs] == [asked.max_tokens for asked in params]
    assert_answers_are_those_alone(llm, given)


@pytest.mark.parametrize("checkpoint", [SDAR, LLADA2])
def test_a_block_cut_by_the_model_s_length_is_one_of_that_width(engines, checkpoint):
    """Where the first block is wider than all there is, its width does not matter."""
    llm, extra = engines(checkpoint, max_model_len=101), {"dlm_threshold": "none"}
    given = [
        (
            {"prompt_token_ids": list(range(20, 110))},
            SamplingParams(
                temperature=0,
                max_tokens=11,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra | {"dlm_block_length": width},
            ),
        )
        for width in (101, 128, 200)
    ]
    whole, *cut = tokens(llm, given)
    assert len(whole) == 11 and cut == [whole, whole]


def test_a_share_counts_from_the_width():
    rule = methods("decoding")["low_confidence_dynamic"](steps=3, block_length=8, threshold=0.5)
    prob = np.array([0.1, 0.6, 0.2, 0.9, 0.5], np.float32)

    def chosen(step, **changed):
        turn = Turn(step, 3, 1, np.arange(5))
        return sorted(replace(rule, **changed).choose(Proposal(prob, prob, prob), turn, lambda: None))

    assert chosen(0) == [1, 3, 4]  # three of eight are due, and two are surer than the threshold
    assert chosen(2) == [1, 3]  # two are due
    assert chosen(0, threshold=0.05) == [0, 1, 2, 3, 4] and chosen(0, threshold=None) == [1, 3, 4]
    assert chosen(0, steps=None) == [1, 3] and chosen(0, steps=None, threshold=None) == [3]


def test_channels_are_turned_where_they_stand():
    """Half of a head's channels, in another order than the checkpoint has them: the products of queries and keys are
    those of the definition."""
    dim, turned, theta = 32, 16, 1e4
    order, positions = halves(dim, turned), torch.tensor([3, 11, 40])
    table = RotaryTable(dim, theta, 64, torch.float32, turned)
    q, k = torch.randn(2, 3, 2, dim, generator=torch.Generator().manual_seed(0))

    def stated(x):
        angle = positions[:, None, None] * theta ** (-torch.arange(0, turned, 2).double() / turned)
        a, b = x[..., : turned // 2].double(), x[..., turned // 2 : turned].double()
        pair = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag, x[..., turned:].double()], -1)

    mine = [rotate(x[..., order], *table(positions)).double() for x in (q, k)]
    wanted = [stated(x) for x in (q, k)]
    products = [torch.einsum("ihd,jhd->hij", *pair) for pair in (mine, wanted)]
    torch.testing.assert_close(*products, atol=1e-5, rtol=1e-5)
