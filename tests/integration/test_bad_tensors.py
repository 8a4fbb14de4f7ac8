"""Tensors that are missing or wrong are refused in one line by the process that loads them: here the worker of the
session's engine, which reads the wrong checkpoint in addition to its own model."""

import json
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.conftest import GOLDEN
from tests.integration.bad_checkpoints import ARCHITECTURE, DREAM, LLADA, LLADA2, MOE, SDAR, copied, refused_config
from vllm_dlm.models import checkpoint


def names(name: str) -> list[str]:
    """A checkpoint's own names of its tensors, of one layer and one expert of many."""
    with safe_open(GOLDEN / "checkpoints" / name / "model.safetensors", "pt") as file:
        keys = file.keys()
        return sorted(key for key in keys if not {"0", "1", "3", *map(str, range(4, 16))} & set(key.split(".")))


TENSORS = [(name, tensor) for name in ARCHITECTURE for tensor in names(name)]


CONFIGURED: dict[tuple, VllmConfig] = {}


def configured(path: str, **settings) -> VllmConfig:
    """vLLM's configuration of this checkpoint. Checkpoints that differ in other tensors alone share it."""
    settings = {"max_model_len": 128, "dtype": "float32"} | settings
    weights = Path(path, "model.safetensors")
    with safe_open(weights, "pt") if weights.exists() else nullcontext() as file:
        head = file is not None and "lm_head.weight" in file.keys()  # noqa: SIM118 - whether a head is tied depends on it
    key = Path(path, "config.json").read_text(), head, *settings.items()
    if key not in CONFIGURED:
        CONFIGURED[key] = AsyncEngineArgs(path, **settings).create_engine_config()
    CONFIGURED[key].model_config.model = path
    CONFIGURED[key].compilation_config.static_forward_context.clear()  # the layers of the model before
    return CONFIGURED[key]


def load(worker, path: str, updates=(), **settings):
    """Loads a checkpoint as a worker does -> (error, warnings, the names it must have)."""
    from vllm.model_executor.model_loader import get_model

    config = configured(path, **settings)
    with patch.object(checkpoint.logger, "warning") as warned, set_current_vllm_config(config):
        try:
            model = get_model(vllm_config=config)
            for update in updates:
                model.load_weights(update)
        except ValueError as error:
            return str(error), warned, None
    return None, warned, model.checkpoint.wanted


@pytest.fixture
def loaded(engines):
    def loaded(path, **settings):
        (outcome,) = engines(LLADA).collective_rpc(load, args=(str(path),), kwargs=settings)
        return outcome

    return loaded


@pytest.fixture
def refused(loaded):
    def refused(path, name: str, tensor: str, **settings) -> str:
        error, _, _ = loaded(path, **settings)
        assert error is not None and "\n" not in error
        assert error.startswith(f"{ARCHITECTURE[name]}: ") and tensor in error
        return error

    return refused


@pytest.mark.parametrize("name, tensor", TENSORS)
def test_a_tensor_is_missing(tmp_path, refused, name, tensor):
    line = refused(copied(name, tmp_path, tensors=lambda t: t.pop(tensor)), name, tensor)
    assert line.endswith(f": 1 tensor missing from the checkpoint: {tensor}")


def test_many_tensors_are_missing(tmp_path, refused):
    def without_layers(tensors):
        for key in [key for key in tensors if ".blocks." in key]:
            del tensors[key]

    line = refused(copied(LLADA, tmp_path, tensors=without_layers), LLADA, "blocks.0")
    assert "36 tensors missing" in line and line.endswith("and 32 more") and len(line) < 400


@pytest.mark.parametrize("name, tensor", TENSORS)
def test_a_tensor_has_another_shape(tmp_path, refused, name, tensor):
    found, expected = [], []

    def cut(tensors):
        expected.extend(tensors[tensor].shape)
        tensors[tensor] = tensors[tensor][: expected[0] // 2].clone()
        found.extend(tensors[tensor].shape)

    line = refused(copied(name, tmp_path, tensors=cut), name, tensor)
    assert f"{tensor} in the checkpoint is {found}" in line and line.endswith(str(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name, tensor", [(LLADA, "model.transformer.blocks.2.up_proj.weight"), (DREAM, "model.norm.weight")]
)
def test_a_value_is_not_a_number(tmp_path, refused, name, tensor, value):
    def spoil(tensors):
        tensors[tensor].view(-1)[7] = value

    assert "NaN or infinite" in refused(copied(name, tmp_path, tensors=spoil), name, tensor)


def test_a_value_is_too_large_for_the_dtype(tmp_path, loaded, refused):
    tensor = "model.layers.2.mlp.up_proj.weight"

    def enlarge(tensors):
        tensors[tensor][3, 4] = -70000

    path = copied(DREAM, tmp_path, tensors=enlarge)
    line = refused(path, DREAM, tensor, dtype="float16")
    assert "7e+04" in line and "torch.float16" in line
    assert loaded(path, dtype="bfloat16")[0] is None


@pytest.mark.parametrize("config", [None, {"torch_dtype": "float32"}], ids=["dtype of the file", "of config.json"])
@pytest.mark.parametrize("bytes_left", [0, 100, 1_000_000])
def test_a_file_is_truncated(tmp_path, bytes_left, config):
    """Seen by the front-end, if the checkpoint lies in a folder."""
    path = copied(LLADA, tmp_path, config)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    line = refused_config(path)
    assert line.startswith(f"LLaDAModelLM: {file} cannot be read, the file may be incomplete: ")


def test_a_file_turns_out_to_be_truncated_when_its_tensors_are_read(engines):
    def tensors():
        yield "model.transformer.ln_f.weight", torch.ones(128)
        raise SafetensorError("incomplete metadata\nmore of it")

    (error,) = engines(LLADA).collective_rpc(read, args=(tensors(),))
    assert error.startswith("LLaDAModelLM: checkpoint some/where cannot be read, the file may be incomplete: ")
    assert error.endswith("incomplete metadata")


def read(worker, tensors) -> str:
    model = worker.model_runner.model
    described = checkpoint.Checkpoint(model, model.hf_to_vllm_mapper, "LLaDAModelLM", "some/where")
    with pytest.raises(ValueError) as refused:
        list(described.checked(tensors))
    return str(refused.value)


def in_two_files(path):
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    keys = sorted(tensors)
    halves = {"model-1.safetensors": keys[:20], "model-2.safetensors": keys[20:]}
    for file, part in halves.items():
        save_file({key: tensors[key] for key in part}, path / file, metadata={"format": "pt"})
    index = {"weight_map": {key: file for file, part in halves.items() for key in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return keys


def test_one_of_two_files_is_missing(tmp_path, loaded, refused):
    path = copied(LLADA, tmp_path)
    keys = in_two_files(path)
    assert loaded(path)[0] is None
    (path / "model-2.safetensors").unlink()
    (path / "model.safetensors.index.json").unlink()  # vLLM would name the file
    assert f"{len(keys) - 20} tensors missing" in refused(path, LLADA, "model.transformer.")


def test_a_width_that_is_not_the_tensors(tmp_path, refused):
    line = refused(copied(LLADA, tmp_path, {"mlp_hidden_size": 512}), LLADA, "model.transformer.blocks.0.ff_")
    assert line.endswith(("is [256, 128], and by config.json it must be [512, 128]", "must be [128, 512]"))


# -- what is right ---------------------------------------------------------------------------


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
