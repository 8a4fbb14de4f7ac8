"""Which prompts are not found in the cache."""

import torch

from tests.engine.prefixes import CHECKPOINTS, SIZE, TIGHT, ask, caching, outputs, some, without
from tests.engine.running import Watching, tokens
from vllm_dlm.integration.requests import salt


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
