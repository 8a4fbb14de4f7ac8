"""The random checkpoints are what the result tables say they are."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import checkpoints
from benchmarks.checkpoints import SHAPES


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stated_parameters(shape):
    small = shape.name.startswith("smoke")
    weights = dict(checkpoints.random_weights(shape, torch.bfloat16, 0)) if small else None
    if weights is not None:
        assert sum(tensor.numel() for tensor in weights.values()) == shape.parameters
    else:
        # two layers where the prompt is what counts
        assert 25e6 < shape.parameters < 30e6 if shape.name == "llada-long" else 90e6 < shape.parameters < 130e6
        assert shape.feed_forward == 3 * shape.width and shape.width // shape.heads == 64


def test_head_shares():
    assert SHAPES["llada-vocabulary"].vocabulary == 126_464
    assert SHAPES["llada-proportions"].head_share == pytest.approx(0.065, abs=0.001)  # LLaDA-8B's


def test_checkpoint_is_deterministic_and_kept(tmp_path, monkeypatch):
    shape = SHAPES["smoke"]
    folders = []
    for name in "ab":
        monkeypatch.setattr(checkpoints, "CACHE", tmp_path / name)
        folders.append(checkpoints.checkpoint(shape))
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    written = (folders[1] / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.checkpoint(shape) == folders[1]
    assert (folders[1] / "model.safetensors").stat().st_mtime_ns == written


def test_tokenizer_covers_the_vocabulary(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(checkpoints, "CACHE", tmp_path)
    shape = SHAPES["smoke"]
    folder = checkpoints.checkpoint(shape)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == shape.vocabulary
    assert tokenizer.eos_token_id == json.loads((folder / "config.json").read_text())["eos_token_id"]
    assert tokenizer.decode([3, 5]) == "w3 w5"
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
