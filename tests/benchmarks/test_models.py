"""The shapes are what the result tables say they are."""

import pytest

from benchmarks.lib.bounds import Peaks, Reading, decoding_bound, denoising_bound
from benchmarks.lib.models import SHAPES
from vllm_dlm.step.counts import Counts

H200 = Peaks(4.8e12, 989e12)


def test_stated_parameters():
    for name in ("llada-vocabulary", "llada-proportions"):
        shape = SHAPES[name]
        assert 90e6 < shape.parameters < 130e6
        assert shape.model.ffn == 3 * shape.model.hidden and shape.model.head_dim == 64
    assert 25e6 < SHAPES["llada-long"].parameters < 30e6  # two layers where the prompt counts


def test_head_shares():
    assert SHAPES["llada-vocabulary"].model.vocabulary == 126_464
    share = SHAPES["llada-proportions"].describe()["head_share_of_parameters"]
    assert share == pytest.approx(0.065, abs=0.001)  # LLaDA-8B's


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_states_the_shape(name, tmp_path):
    """In transformers' words or in LLaDA's"""
    shape = SHAPES[name]
    config = shape.config(512)
    sizes = (config.get("hidden_size", config.get("d_model")), config.get("num_hidden_layers", config.get("n_layers")))
    assert sizes == (shape.model.hidden, shape.model.layers) and config["vocab_size"] == shape.model.vocabulary
    assert config.get("head_dim", config.get("d_model", 0) // shape.model.heads or shape.model.head_dim)
    assert (shape.folder(tmp_path) / "config.json").exists()


def test_a_step_of_llada_is_bound_by_its_weights_until_it_has_many_rows():
    """7.5e9 weights without the embedding, two bytes each: 3.1 ms on an H200."""
    shape = SHAPES["llada-8b"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 12288) + 4096 * 126464
    assert shape.weight_bytes() == 2 * weights
    assert shape.weight_bytes() / H200.bytes_per_s == pytest.approx(3.12e-3, 1e-2)
    few, many = Counts(head_rows=32), Counts(head_rows=32 * 32)
    for counts, n in ((few, 32), (many, 32 * 1088)):
        counts.rows = dict.fromkeys(counts.rows, 32 * n)
        counts.keys_read = 32 * 1088
    found = denoising_bound(shape, few, H200)
    assert found.by == "bytes"
    assert found.ms == pytest.approx(1e3 * (2 * weights + 32 * 1088 * 2 * 4096 * 2) / 4.8e12)
    found = denoising_bound(shape, many, H200)
    assert found.by == "FLOPs"
    assert found.ms == pytest.approx(2e3 * ((weights - 4096 * 126464) * 32 * 1088 + 4096 * 126464 * 1024) / 989e12)


def test_decoding_with_chosen_pages_reads_their_keys_and_the_summaries_of_all():
    shape, context = SHAPES["qwen2.5-7b"], 32768
    key = 2 * 2 * 4 * 128  # bytes of a key and its value in a layer
    dense = decoding_bound(shape, context, 8, None, H200)
    assert dense.ms == pytest.approx(1e3 * (shape.weight_bytes() + 8 * 28 * context * key) / 4.8e12)
    sparse = decoding_bound(shape, context, 8, Reading(2048, 64, 26), H200)
    summaries = context // 64 * 4 * (2 * 128 + 4)
    read = 8 * (2 * context * key + 26 * (2048 * key + summaries))
    assert sparse.ms == pytest.approx(1e3 * (shape.weight_bytes() + read) / 4.8e12)
