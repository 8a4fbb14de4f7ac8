"""Selections of models that know blocks: of all that is finished, prompt or answer, the current block sees a part."""

import random

import pytest
import torch
from vllm import SamplingParams

from tests.engine.running import Counted, Watching, core_of, free_blocks, poison, tokens
from tests.engine.test_selection import KEEP_ALL, SELECTIONS, each_on_one, tiered
from tests.tiers import in_turn, slow
from vllm_dlm.canvas.block_causal import BlockCausalAttention
from vllm_dlm.canvas.selected_keys import SelectedKeys
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.roles import RandomOrder, ShadowingDecoding

CHECKPOINTS = ["sdar-tiny", "llada2-tiny"]


def engine(engines, checkpoint, selection, **settings):
    return engines(checkpoint, additional_config={"dlm": {"selection": selection}}, **settings)


def mixed(count: int, seed: int = 4):
    """Every decoding of such models, guided ones and some without a selection; answers long enough to be left out."""
    rng = random.Random(seed)
    names = sorted(name for name, method in methods("decoding").items() if not issubclass(method, ShadowingDecoding))
    for index in range(count):
        name = names[index % len(names)]
        extra = {"dlm_decoding": name, "dlm_block_length": rng.choice([4, 8, 16, 5])}
        if issubclass(methods("decoding")[name], RandomOrder):
            extra["dlm_threshold"] = "none"
        if index % 7 == 3:
            extra["dlm_cfg_scale"] = 0.7
        if index % 5 == 4:
            extra["dlm_selection"] = "none"
        params = SamplingParams(
            temperature=0.8 * (index % 4 == 0),
            seed=index,
            max_tokens=rng.choice([5, 20, 40]),
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield {"prompt_token_ids": [rng.randrange(390) for _ in range(rng.choice([3, 70, 97, 140]))]}, params


@pytest.mark.parametrize("checkpoint, name", tiered(each_on_one(CHECKPOINTS, SELECTIONS)))
def test_mixed_batches(engines, checkpoint, name):
    """Together, the other way round and alone, where no memory holds anything but NaN; and something is left out."""
    llm = engine(engines, checkpoint, SELECTIONS[name])
    given = list(mixed(12))
    with Counted(llm) as counted:
        together = tokens(llm, given)
    assert 0 < counted.total("keys_read") < counted.total("keys_dense")
    assert counted.total("keys_scored") > 0 and counted.total("summaries") > 0
    assert tokens(llm, given[::-1]) == together[::-1]
    poison(llm)
    assert [tokens(llm, [request])[0] for request in given] == together
    core = core_of(llm)
    assert free_blocks(core) == core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


@pytest.mark.parametrize("checkpoint, name", in_turn(CHECKPOINTS, list(KEEP_ALL), most=1))
def test_seeing_all_is_the_model(engines, monkeypatch, checkpoint, name):
    """By the sparse path: everything is chosen."""
    given = list(mixed(12))
    for _, params in given:
        params.extra_args.pop("dlm_selection", None)
    want = tokens(engines(checkpoint), given)
    llm, method = engine(engines, checkpoint, KEEP_ALL[name]), methods("selection")[KEEP_ALL[name]["name"]]
    monkeypatch.setattr(
        method,
        "applies",
        lambda self, prompt_len, length: (
            prompt_len >= 2**self.levels if hasattr(self, "levels") else prompt_len >= self.page_size
        ),
    )
    with Counted(llm) as counted:
        assert tokens(llm, given) == want
    assert counted.total("keys_scored") > 0


@pytest.mark.parametrize("checkpoint", ["sdar-tiny", *slow("llada2-tiny")])
def test_little_memory_and_long_prompts(engines, monkeypatch, checkpoint):
    """Requests give up their blocks, summaries among them, and prompts are read in several steps."""
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", 32)
    given, selection = list(mixed(14, 9)), SELECTIONS["unique"]
    wanted = tokens(engine(engines, checkpoint, selection), given)
    llm = engine(engines, checkpoint, selection, block_size=16, num_gpu_blocks_override=40)
    scheduler, preempted = core_of(llm).scheduler, []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, now: (preempted.append(request), preempt(request, now))
    try:
        assert tokens(llm, given) == wanted
    finally:
        del scheduler._preempt_request
    assert preempted and free_blocks(core_of(llm)) == 39


class Summaries(Watching):
    """After each step: those of the view are of the keys that are final by now."""

    def __enter__(self):
        self.seen, self.views = [], set()
        return super().__enter__()

    def step_begins(self, states):
        self.state = states[0]
        self.written, self.selects = states[0].canvas.written, states[0].canvas.block_step > 0

    def step_ended(self, requests, counts):
        view: SelectedKeys | None = self.state.feature(BlockCausalAttention).keys.get(False)
        if view is None or not self.selects:
            return
        assert view.prompt_len == self.written
        self.views.add(id(view))
        selection = view.selection
        for layer, cache in enumerate(self.denoiser.blocks.layers):
            if selection.sees_all(layer):
                continue
            dim, count = cache.shape[3] // 2, view.units.candidates
            rows = cache[view.kv_table.tolist()].transpose(1, 2).flatten(0, 1)  # [N, Hkv, 2 * D]
            first, second = selection.summarise(rows[:count, :, :dim], [count])
            kept = cache[view.summary_table.tolist()].transpose(1, 2).flatten(0, 1)[: view.units.summaries]
            torch.testing.assert_close(kept[..., : first.shape[2]], first, rtol=0, atol=0)
            torch.testing.assert_close(kept[..., dim : dim + second.shape[2]], second, rtol=0, atol=0)
        self.seen.append((view.prompt_len, view.length))


def test_summaries_are_of_what_is_final(engines):
    """Of prompt and answer, to the beginning of the current block, from its second step on."""
    llm = engine(engines, CHECKPOINTS[0], SELECTIONS["unique"])
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, detokenize=False, extra_args={"dlm_block_length": 8}
    )
    with Summaries(llm) as summaries:
        tokens(llm, [({"prompt_token_ids": list(range(100))}, params)])
    assert summaries.seen[0] == (96, 104)  # once the prompt is read
    assert {length - final for final, length in summaries.seen} == {8}
    assert summaries.seen[-1] == (152, 160) and len(set(summaries.seen)) == 8
    assert {summaries.seen.count(each) for each in set(summaries.seen)} == {3, 7}  # of 4 and 8 steps; see above


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_keys_of_what_is_finished_are_the_models_own(engines, checkpoint):
    """Rows that read a prompt or a finished block see all of it: with a token given, its keys are as without."""
    llm = engine(engines, checkpoint, SELECTIONS["unique"])
    ids = [random.Random(1).randrange(390) for _ in range(130)]
    extra = {"dlm_block_length": 8}

    def keys(of, selection, prompt, length):
        params = SamplingParams(
            temperature=0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra | {"dlm_selection": selection},
        )
        with Tables(of) as tables:
            (got,) = tokens(of, [({"prompt_token_ids": prompt}, params)])
        kept = torch.stack([cache[tables.kv].transpose(1, 2).flatten(0, 1) for cache in tables.denoiser.blocks.layers])
        return got, kept

    got, own = keys(llm, "unique", ids, 60)
    text = [*ids, *got]
    final = (len(text) - 1) // 8 * 8
    _, want = keys(llm, "none", text, 1)
    torch.testing.assert_close(own[:, :final], want[:, :final], atol=2e-5, rtol=1e-4)


class Tables(Watching):
    def step_begins(self, states):
        self.state = states[0]

    def step_ended(self, requests, counts):
        self.kv = self.state.blocks[0].kv.tolist()
