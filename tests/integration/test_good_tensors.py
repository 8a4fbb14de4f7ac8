"""What a checkpoint may hold, and may leave out: tied heads, unused tensors, quantised layers."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN
from tests.integration.bad_checkpoints import DREAM, LLADA, LLADA2, MOE, SDAR, copied
from tests.integration.loading import loaded, refused

__all__ = ["loaded", "refused"]  # fixtures


@pytest.mark.parametrize("name", [LLADA, "llada-tiny-gqa", DREAM, MOE, SDAR, LLADA2])
def test_the_names_follow_from_the_model(loaded, name):
    path = GOLDEN / "checkpoints" / name
    error, warned, wanted = loaded(path)
    assert error is None and not warned.called
    assert {key: list(tensor.shape) for key, tensor in wanted.items()} == {
        key: list(tensor.shape) for key, tensor in load_file(path / "model.safetensors").items()
    }


@pytest.mark.parametrize("stored", [True, False], ids=["stored twice", "stored once"])
@pytest.mark.parametrize(
    "name, field, head",
    [(LLADA, "weight_tying", "model.transformer.ff_out.weight"), (DREAM, "tie_word_embeddings", "lm_head.weight")],
)
def test_a_tied_head(tmp_path, loaded, name, field, head, stored):
    tensors = None if stored else (lambda tensors: tensors.pop(head))
    error, warned, wanted = loaded(copied(name, tmp_path, {field: True}, tensors))
    assert error is None and not warned.called
    # vLLM takes a model for untied whose checkpoint has a head of that name
    assert (head in wanted) == (stored and head == "lm_head.weight")


def test_a_tied_head_does_not_stand_for_its_embedding(tmp_path, refused):
    embedding = "model.transformer.wte.weight"
    refused(copied(LLADA, tmp_path, {"weight_tying": True}, lambda tensors: tensors.pop(embedding)), LLADA, embedding)


def test_tensors_nobody_uses_are_named_in_one_warning(tmp_path, loaded):
    extra = {
        "model.transformer.blocks.0.q_norm.weight": torch.ones(32),
        "model.transformer.blocks.0.q_proj.bias": torch.ones(128),
        "vision.weight": torch.full((2,), float("nan")),
        "model.transformer.blocks.0.rotary_emb.inv_freq": torch.ones(16),  # derived: dropped in silence, as by vLLM
    }
    error, warned, _ = loaded(copied(LLADA, tmp_path, tensors=lambda tensors: tensors.update(extra)))
    assert error is None
    ((line, *values),) = [call.args for call in warned.call_args_list]
    assert "3 tensors" in line % tuple(values)
    assert [key in line % tuple(values) for key in extra] == [True, True, True, False]


def test_dummy_weights_and_what_replaces_them_piece_by_piece(tmp_path, loaded):
    path = copied(LLADA, tmp_path)
    tensors = load_file(path / "model.safetensors").items()
    # (vLLM's CPU workers replace matrices by packed ones, which cannot be loaded again.)
    pieces = [[(key, tensor)] for key, tensor in tensors if tensor.ndim == 1]
    (path / "model.safetensors").unlink()
    assert loaded(path, load_format="dummy", updates=pieces)[0] is None
    wrong = [[("model.transformer.ln_f.weight", torch.ones(3))]]
    assert "model.transformer.ln_f.weight" in loaded(path, load_format="dummy", updates=wrong)[0]


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "model.transformer.ff_out"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def quantised(tensors):
    """Every linear layer as integers with one scale per channel."""
    for key in [k for k in tensors if ("blocks." in k or "layers." in k) and tensors[k].ndim == 2]:
        weight = tensors.pop(key)
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[key], tensors[f"{key}_scale"] = (weight / scale).round().to(torch.int8), scale


@pytest.mark.parametrize("name", [LLADA, DREAM])
def test_a_quantised_checkpoint(tmp_path, loaded, name):
    error, warned, _ = loaded(copied(name, tmp_path, {"quantization_config": QUANTISED}, quantised))
    assert error is None and not warned.called


@pytest.mark.parametrize(
    "name, module",
    [
        (LLADA, "model.transformer.blocks.2.up_proj."),
        (LLADA, "model.transformer.blocks.2.attn_norm."),
        (DREAM, "model.layers.2.self_attn.q_proj."),
        (DREAM, "model.layers.2.self_attn.q_proj.bias"),
    ],
)
def test_a_module_of_a_quantised_checkpoint_is_missing(tmp_path, refused, name, module):
    def without(tensors):
        quantised(tensors)
        for key in [key for key in tensors if key.startswith(module)]:
            del tensors[key]

    refused(copied(name, tmp_path, {"quantization_config": QUANTISED}, without), name, module)
