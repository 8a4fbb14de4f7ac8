"""What is recorded, and what holds for all methods, with caches in the layout of vLLM's CPU kernel. Whether an engine
has them depends on its CPU; the engines of other tests have none."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.engine.matrix import assert_answers_are_those_alone, combinations, small
from tests.engine.running import poison, runner_of
from tests.engine.test_block_causal import RUNS as BLOCK_RUNS
from tests.engine.test_block_causal import assert_recorded_run
from tests.engine.test_golden import CASES, assert_greedy_runs
from tests.engine.test_reuse_golden import FAST, RUNS, assert_fast_run, assert_official_outputs, fast, official
from tests.tiers import first_of_each
from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.kernels.packed_attention.dispatch import layout_of
from vllm_dlm.methods import methods


@contextmanager
def packed(llm) -> Iterator:
    runner = runner_of(llm)
    denoiser, own = runner.denoiser, runner.denoiser.blocks
    config, size = runner.model_config.hf_config, runner.vllm_config.cache_config.block_size
    layout = layout_of(runner.model_config.dtype, size, config.head_dim)
    assert layout is not None and own.layout is None
    poison(llm)
    denoiser.blocks = KVBlocks(runner.kv_caches, layout)
    try:
        yield llm
    finally:
        poison(llm)
        denoiser.blocks = own


@pytest.mark.parametrize(("checkpoint", "names"), CASES, ids=[case[0] for case in CASES])
def test_greedy_runs(engines, golden_runs, checkpoint, names):
    with packed(engines(checkpoint)) as llm:
        assert_greedy_runs(llm, golden_runs, names)


@pytest.mark.parametrize(
    "run", first_of_each(lambda run: (run["method"], run["checkpoint"]), [(run["file"], run) for run in RUNS])
)
def test_official_outputs(engines, run):
    with packed(official(engines, run)) as llm:
        assert_official_outputs(llm, run)


@pytest.mark.parametrize("name", FAST)
def test_fast_dllm_runs(engines, golden_runs, name):
    with packed(fast(engines, golden_runs, name)) as llm:
        assert_fast_run(llm, golden_runs, name)


@pytest.mark.parametrize("name", [name for name in BLOCK_RUNS if name.startswith(("sdar", "llada20"))][::3])
def test_runs_of_block_causal_models(engines, name):
    with packed(engines(BLOCK_RUNS[name]["ckpt"])) as llm:
        assert_recorded_run(llm, name)


@pytest.mark.parametrize(
    "selection", ["none", *sorted(name for name, cls in methods("selection").items() if cls.sparse)]
)
def test_tokens_are_those_alone(engines, selection):
    options = {"dlm": {"selection": small("selection", selection)}}
    with packed(engines("llada-tiny-gqa", additional_config=options)) as llm:
        assert_answers_are_those_alone(llm, list(combinations(selection))[::3])
