"""Prefixes in vLLM's cache: what is found there changes no token, and is not computed again."""

import random

import pytest
import torch
from vllm import SamplingParams

from tests.engine.running import Rows, Watching, core_of, free_blocks, poison, runner_of, tokens
from tests.tiers import slow
from vllm_dlm.families import FAMILIES
from vllm_dlm.integration.requests import salt
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.roles import RandomOrder, RevokingDecoding

CHECKPOINTS = ["sdar-tiny", "llada2-tiny"]
SHIFTED = "fast-dllm-v2-tiny"  # logits predict the next position
SIZE = 32  # of vLLM's blocks
USUAL = {"sdar-tiny": 4, "llada2-tiny": 32, SHIFTED: 32}  # width of canvas blocks
LONG = {"max_model_len": 2048, "hf_overrides": {"max_position_embeddings": 2048}}
TIGHT = {"max_model_len": 480, "num_gpu_blocks_override": 16, "max_num_batched_tokens": 2048}


def caching(engines, checkpoint, **settings):
    llm = engines(checkpoint, block_size=SIZE, disable_log_stats=False, **(LONG | settings))
    poison(llm)
    return llm


def without(engines, checkpoint):
    return engines(checkpoint, block_size=SIZE, enable_prefix_caching=False, **LONG)


def outputs(llm, given):
    """-> tokens of each, and how many of its prompt's were found"""
    prompts, params = zip(*given, strict=True)
    got = llm.generate(list(prompts), list(params), use_tqdm=False)
    core = core_of(llm)
    assert free_blocks(core) == core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    return [tuple(one.outputs[0].token_ids) for one in got], [one.num_cached_tokens for one in got]


def ask(ids, length=8, salted=None, **extra):
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra)
    prompt = {"prompt_token_ids": list(ids)}
    return prompt | ({"cache_salt": salted} if salted else {}), params


def some(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(390) for _ in range(count)]


def mixed(count: int, seed: int = 1):
    """Every decoding of such models; prompts that begin alike, in groups, some of them the beginning of others, and
    widths that divide vLLM's blocks or do not."""
    rng, stems = random.Random(seed), [some(120, stem) for stem in range(3)]
    names = sorted(name for name, method in methods("decoding").items() if not issubclass(method, RevokingDecoding))
    for index in range(count):
        name, width = names[index % len(names)], rng.choice([4, 4, 8, 32, 32, 5, 64])
        extra = {"dlm_decoding": name, "dlm_block_length": width}
        if issubclass(methods("decoding")[name], RandomOrder):
            extra["dlm_threshold"] = "none"
        if index % 9 == 4:
            extra["dlm_cfg_scale"] = 0.7
        stem = rng.choice(stems)[: rng.choice([120, 120, 97, 64, 30])]
        prompt = stem + some(rng.choice([0, 1, 20, 50]), index)
        params = SamplingParams(
            temperature=0.8 * (index % 4 == 0),
            seed=index,
            max_tokens=rng.randint(1, 40),
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield {"prompt_token_ids": prompt}, params


class Known:
    """What must be in a cache of one request after the other, told from their texts."""

    def __init__(self, usual: int, shift: int):
        self.usual, self.shift, self.blocks = usual, shift, set()

    def hit(self, prompt, params, got) -> int:
        extra, ids = params.extra_args or {}, prompt["prompt_token_ids"]
        width, text = extra.get("dlm_block_length", self.usual), [*ids, *got]
        if extra.get("dlm_cfg_scale") or width not in (4, 8, 32):
            return 0
        final, hit = len(ids) // width * width - self.shift, 0  # a shifted model reads the last row again
        while hit + SIZE <= final and (width, *text[: hit + SIZE]) in self.blocks:
            hit += SIZE
        # the last block is not read again once it is finished
        written = (len(text) - 1) // width * width
        self.blocks |= {(width, *text[:end]) for end in range(SIZE, written + 1, SIZE)}
        return hit


def test_checkpoints_of_all_such_families():
    """As far as they differ in what may be found"""
    kinds = {family.logits_shift for family in FAMILIES.values() if family.attention == "block_causal"}
    assert kinds == {FAMILIES["SDARForCausalLM"].logits_shift, FAMILIES["Fast_dLLM_QwenForCausalLM"].logits_shift}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_shared_prompt_is_computed_once(engines, checkpoint):
    llm, stem = caching(engines, checkpoint), some(1024)
    given = [ask(stem + some(rest, rest), 8, dlm_block_length=4) for rest in (30, 41, 0)]
    wanted = tokens(without(engines, checkpoint), given)
    metrics = counted(llm)
    found, live = [], []
    for request, want in zip(given, wanted, strict=True):
        with Rows(llm) as rows:
            got, hits = outputs(llm, [request])
        assert got == [want]
        found += hits
        live.append(rows.live)
    assert found == [0, 1024, 1024]
    # the prompt's whole blocks and the one that is being filled; behind 1,024 positions in a second step
    assert sum(live[0][:2]) == 1024 + 28 + 4
    assert live[1][0] == 40 + 4 and live[2][0] == 4
    assert {rows for own in live for rows in own[2:]} == {4, 8}
    after = counted(llm)
    assert after["vllm:prefix_cache_hits"] - metrics["vllm:prefix_cache_hits"] == 2048
    assert after["vllm:prefix_cache_queries"] - metrics["vllm:prefix_cache_queries"] == 3 * 1024 + 71


def counted(llm) -> dict[str, float]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, SHIFTED])
@pytest.mark.parametrize("order", [1, -1])
def test_one_after_the_other(engines, checkpoint, order):
    """Hits are those that the texts say, and change no token."""
    given = list(mixed(48))[::order]
    wanted = tokens(without(engines, checkpoint), given)
    llm, known, found = caching(engines, checkpoint), Known(USUAL[checkpoint], int(checkpoint == SHIFTED)), []
    for request, want in zip(given, wanted, strict=True):
        got, (hit,) = outputs(llm, [request])
        assert got == [want], request
        assert hit == known.hit(*request, want), request
        found.append(hit)
    assert sum(hit > 0 for hit in found) > 10 and 0 in found


@pytest.mark.parametrize("chunk", [1024, 16])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_together(engines, monkeypatch, checkpoint, chunk):
    """Hits, misses, guided ones and those that start alike in the same step; in a second batch nearly all are hits."""
    given = list(mixed(48, 2))
    wanted = tokens(without(engines, checkpoint), given)
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", chunk)
    llm = caching(engines, checkpoint)
    first, found = outputs(llm, given)
    assert first == wanted and found[0] == 0
    again, found = outputs(llm, given[::-1])
    assert again == wanted[::-1] and sum(hit > 0 for hit in found) > 20
    rest, _ = outputs(llm, list(mixed(48, 3)))
    assert rest == tokens(without(engines, checkpoint), list(mixed(48, 3)))


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, *slow(SHIFTED)])
def test_little_memory(engines, checkpoint):
    """Requests wait, give up their blocks and find them again, or somebody else has them by then."""
    given = list(mixed(32, 4))
    wanted = tokens(without(engines, checkpoint), given)
    llm = caching(engines, checkpoint, **TIGHT)
    scheduler, resumed = core_of(llm).scheduler, []
    admitted = scheduler.prefixes.admitted
    scheduler.prefixes.admitted = lambda request, canvas: (
        resumed.append((request.num_preemptions, canvas.written)),
        admitted(request, canvas),
    )
    try:
        for _ in range(2):
            assert outputs(llm, given)[0] == wanted
    finally:
        del scheduler.prefixes.admitted
    assert any(count and written for count, written in resumed) and any(not written for _, written in resumed)


def test_an_answer_is_the_next_turns_prompt(engines):
    """Its keys and values are those of a prompt."""
    for checkpoint in CHECKPOINTS:
        llm, prompt = caching(engines, checkpoint), some(50, 7)
        (answer,), _ = outputs(llm, [ask(prompt, 80, dlm_block_length=8)])
        text = [*prompt, *answer]
        turn = ask(text + some(9, 8), 8, dlm_block_length=8)
        (blocks,) = cached(llm, text, 8)
        assert len(blocks) == 128 // SIZE  # of 130 tokens, the last ones were not read again
        before = [kv[blocks].clone() for kv in runner_of(llm).kv_caches]
        got, hits = outputs(llm, [turn])
        assert hits == [128] and got == tokens(without(engines, checkpoint), [turn])
        poison(llm)
        outputs(llm, [turn])
        (blocks,) = cached(llm, text, 8)
        for old, kv in zip(before, runner_of(llm).kv_caches, strict=True):
            torch.testing.assert_close(old, kv[blocks], atol=2e-5, rtol=1e-4)


def cached(llm, ids, width):
    """Blocks that a request with these tokens would find"""
    core, held = core_of(llm), []

    class Found(Watching):
        def step_begins(self, states):
            held.append(
                core.scheduler.kv_cache_manager.get_block_ids(states[0].req_id)[0][: states[0].canvas.written // SIZE]
            )

    with Found(llm):
        outputs(llm, [ask(ids, 1, dlm_block_length=width)])
    return held[:1]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("steps", range(1, 7))
def test_a_prompt_that_was_not_read_to_its_end(engines, monkeypatch, checkpoint, steps):
    """Its client leaves: what has been read is found, and no more."""
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", 24)
    llm, request = caching(engines, checkpoint), ask(some(120, 5), 12, dlm_block_length=4)
    engine = llm.llm_engine
    name = engine.add_request("left", *request)
    for _ in range(steps):
        engine.step()
    engine.abort_request([name], internal=True)
    engine.step()
    got, hits = outputs(llm, [request])
    assert hits == [min(24 * steps, 120) // SIZE * SIZE] and got == tokens(without(engines, checkpoint), [request])


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_reset_forgets_all(engines, monkeypatch, step):
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", 32)
    given = [ask(some(120, 6) + some(index, index), 12, dlm_block_length=4) for index in range(0, 12, 3)]
    wanted = tokens(without(engines, CHECKPOINTS[0]), given)
    llm, got = caching(engines, CHECKPOINTS[0]), {}
    for index, request in enumerate(given):
        llm.llm_engine.add_request(str(index), *request)
    at = 0
    while llm.llm_engine.has_unfinished_requests():
        if at == step:
            assert not llm.reset_prefix_cache()  # blocks are in use
            assert core_of(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
            for cache in runner_of(llm).kv_caches:
                cache.fill_(torch.nan)
        for output in llm.llm_engine.step():
            got[int(output.request_id)] = tuple(output.outputs[0].token_ids)
        at += 1
    assert [got[index] for index in range(len(given))] == wanted
    assert outputs(llm, given[:1])[1] == [96] and llm.reset_prefix_cache()
    assert outputs(llm, given[:1]) == (wanted[:1], [0])


def test_what_goes_wrong_is_not_found(engines, monkeypatch):
    """A request that fails takes what it wrote with it."""
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", 32)
    llm, request = caching(engines, CHECKPOINTS[0]), ask(some(100, 9), 12)
    wanted = tokens(without(engines, CHECKPOINTS[0]), [request])
    decoding = type(llm.model_config.dlm_options.decoding)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "choose", lambda *_: 1 / 0)
        (failed,) = llm.generate(*request, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error"
    assert outputs(llm, [request]) == (wanted, [0])


class Breaking(Watching):
    """Everything that the second step of a prompt writes is NaN."""

    def __enter__(self):
        self.steps = 0
        return super().__enter__()

    def step_ended(self, requests, counts):
        self.steps += 1
        if self.steps == 2:
            for cache in self.denoiser.blocks.layers:
                cache.fill_(torch.nan)


def test_what_became_nan_is_not_found(engines, monkeypatch):
    monkeypatch.setattr("vllm_dlm.canvas.block_causal.CHUNK", 32)
    llm, request = caching(engines, CHECKPOINTS[0]), ask(some(100, 9), 12)
    with Breaking(llm):
        (failed,) = llm.generate(*request, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error"
    assert outputs(llm, [request]) == (tokens(without(engines, CHECKPOINTS[0]), [request]), [0])


def test_who_does_not_share(engines):
    """Others' salts, other widths of blocks, guided ones."""
    llm, ids = caching(engines, CHECKPOINTS[0]), some(90, 3)
    assert outputs(llm, [ask(ids)])[1] == [0]
    assert outputs(llm, [ask(ids, salted="mine")])[1] == [0]
    assert outputs(llm, [ask(ids, salted="8")])[1] == [0]
    assert outputs(llm, [ask(ids, dlm_block_length=8)])[1] == [0]
    assert outputs(llm, [ask(ids, dlm_block_length=8, salted="mine")])[1] == [0]
    assert outputs(llm, [ask(ids, dlm_cfg_scale=0.5)])[1] == [0]
    assert outputs(llm, [ask(ids, dlm_cfg_scale=0.5)])[1] == [0]
    again = [ask(ids), ask(ids, salted="mine"), ask(ids, salted="8"), ask(ids, dlm_block_length=8)]
    assert outputs(llm, again)[1] == [64] * 4
    assert outputs(llm, [ask(ids, dlm_block_length=4, salted="mine")])[1] == [64]


def test_blocks_that_reach_beyond_vllms_are_not_shared(engines):
    """Their keys depend on what comes behind the text that a hash tells."""
    llm, stem = caching(engines, CHECKPOINTS[0]), some(SIZE, 3)
    given = [ask(stem + some(60, index), dlm_block_length=2 * SIZE) for index in range(2)]
    assert [outputs(llm, [request])[1] for request in (*given, *given)] == [[0]] * 4


def test_salts_tell_apart():
    pairs = [(given, width) for given in (None, "4", "8", "8 4", " 4", "") for width in (4, 8, 84)]
    assert len({salt(given, width, 4) for given, width in pairs}) == len(pairs)
    assert salt(None, 4, 4) is None


def test_a_request_may_not_want_it(engines):
    llm, (prompt, params) = caching(engines, CHECKPOINTS[0]), ask(some(90, 3))
    assert outputs(llm, [(prompt, params)])[1] == [0]
    params.skip_reading_prefix_cache = True
    assert outputs(llm, [(prompt, params)])[1] == [0]


def test_switched_off(engines):
    request = ask(some(90, 3))
    for _ in range(2):
        assert outputs(without(engines, CHECKPOINTS[0]), [request])[1] == [0]


def test_blocks_that_are_in_use_are_counted_once(engines):
    """Of four requests each would fill most of the memory; sharing their prompt, they run side by side."""
    llm = caching(engines, CHECKPOINTS[0], **TIGHT)
    stem = some(320, 4)
    given = [ask(stem + some(8, index), 16) for index in range(4)]
    wanted = tokens(without(engines, CHECKPOINTS[0]), given)
    outputs(llm, given[:1])
    together = []

    class Beside(Watching):
        def step_begins(self, states):
            together.append(len(states))

    with Beside(llm):
        got, hits = outputs(llm, given)
    assert got == wanted and hits == [320] * 4 and max(together) == 4
