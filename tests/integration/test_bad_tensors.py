"""Tensors that are missing or wrong are refused in one line by the process that loads them: here the worker of the
session's engine, which reads the wrong checkpoint in addition to its own model."""

import copy
import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config

from tests.conftest import GOLDEN
from tests.integration.bad_checkpoints import ARCHITECTURE, DREAM, LLADA, copied, refused_config
from tests.integration.loading import configured, loaded, refused
from tests.tiers import first_of_each
from vllm_dlm.models import checkpoint

__all__ = ["loaded", "refused"]  # fixtures


def names(name: str) -> list[str]:
    """A checkpoint's own names of its tensors, of one layer and one expert of many; without a tied head, which need not
    be there."""
    folder = GOLDEN / "checkpoints" / name
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys()) - ({"lm_head.weight"} if tied else set())
        return sorted(key for key in keys if not {"0", "1", "3", *map(str, range(4, 16))} & set(key.split(".")))


TENSORS = [(name, tensor) for name in ARCHITECTURE for tensor in names(name)]


MODELS: dict[str, torch.nn.Module] = {}


def decide(worker, name: str, tensors: dict[str, torch.Tensor]) -> str:
    """How these tensors are refused: the decision alone, by a model that has been loaded with the right ones."""
    from vllm.model_executor.model_loader import get_model

    if name not in MODELS:
        config = configured(str(GOLDEN / "checkpoints" / name))
        with set_current_vllm_config(config):
            MODELS[name] = get_model(vllm_config=config)
    described = copy.copy(MODELS[name].checkpoint)
    described.came = set()
    with pytest.raises(ValueError) as refused:
        list(described.checked(tensors.items()))
        described.refuse_missing()
    return str(refused.value)


@pytest.fixture
def decided(engines):
    def decided(name: str, change) -> str:
        tensors = load_file(GOLDEN / "checkpoints" / name / "model.safetensors")
        change(tensors)
        (line,) = engines(LLADA).collective_rpc(decide, args=(name, tensors))
        assert line.startswith(f"{ARCHITECTURE[name]}: ") and "\n" not in line
        return line

    return decided


#: one tensor of each checkpoint in `make test`, all of them in `make test-slow`
AT_START = first_of_each(lambda case: case[0], ((f"{name}-{tensor}", (name, tensor)) for name, tensor in TENSORS))


@pytest.mark.parametrize("name, tensor", TENSORS)
def test_a_tensor_is_missing(decided, name, tensor):
    assert decided(name, lambda t: t.pop(tensor)).endswith(f": 1 tensor missing from the checkpoint: {tensor}")


@pytest.mark.parametrize("case", AT_START)
def test_a_tensor_is_missing_at_the_start(tmp_path, refused, case):
    name, tensor = case
    line = refused(copied(name, tmp_path, tensors=lambda t: t.pop(tensor)), name, tensor)
    assert line.endswith(f": 1 tensor missing from the checkpoint: {tensor}")


def test_many_tensors_are_missing(tmp_path, refused):
    def without_layers(tensors):
        for key in [key for key in tensors if ".blocks." in key]:
            del tensors[key]

    line = refused(copied(LLADA, tmp_path, tensors=without_layers), LLADA, "blocks.0")
    assert "36 tensors missing" in line and line.endswith("and 32 more") and len(line) < 400


@pytest.mark.parametrize("name, tensor", TENSORS)
def test_a_tensor_has_another_shape(decided, name, tensor):
    line = decided(name, cut := Cut(tensor))
    assert f"{tensor} in the checkpoint is {cut.found}" in line and line.endswith(str(cut.expected))


@pytest.mark.parametrize("case", AT_START)
def test_a_tensor_has_another_shape_at_the_start(tmp_path, refused, case):
    name, tensor = case
    line = refused(copied(name, tmp_path, tensors=(cut := Cut(tensor))), name, tensor)
    assert f"{tensor} in the checkpoint is {cut.found}" in line and line.endswith(str(cut.expected))


class Cut:
    """Halves a tensor."""

    def __init__(self, tensor: str):
        self.tensor = tensor

    def __call__(self, tensors: dict[str, torch.Tensor]) -> None:
        whole = tensors[self.tensor]
        self.expected = list(whole.shape)
        tensors[self.tensor] = whole[: len(whole) // 2].clone()
        self.found = list(tensors[self.tensor].shape)


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
