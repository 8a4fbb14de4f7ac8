"""Quantized checkpoints that would give wrong answers, or fail in the first step, are refused by name when loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.loading import load
from tests.quantization.checkpoints import METHODS, pair
from vllm_dlm.models import quantization

LLADA, LLADA2 = "llada-tiny", "llada2-tiny"
PROJECTION = "model.transformer.blocks.1.q_proj"


@pytest.fixture
def copy(folder, tmp_path):
    """copy(name, method, tensors=, config=) -> a quantized checkpoint that is wrong in something"""

    def made(name, method, tensors=None, config=None):
        quantized, _ = pair(name, method, folder)
        path = tmp_path / "copy"
        path.mkdir()
        for file in quantized.iterdir():
            (path / file.name).symlink_to(file)
        if tensors is not None:
            weights = load_file(quantized / "model.safetensors")
            tensors(weights)
            (path / "model.safetensors").unlink()
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            fields = json.loads((quantized / "config.json").read_text())
            config(fields["quantization_config"])
            (path / "config.json").unlink()
            (path / "config.json").write_text(json.dumps(fields))
        return path

    return made


@pytest.fixture
def refused(engines):
    """refused(path, dtype) -> the line with which it is refused"""

    def refused(path, dtype, **settings):
        ((error, _, _),) = engines(LLADA).collective_rpc(load, args=(str(path),), kwargs={"dtype": dtype} | settings)
        assert error is not None and "\n" not in error
        return error

    return refused


def dtype_of(method: str) -> str:
    return METHODS[method][2]


def test_activations_with_one_scale_for_all_rows(refused):
    line = refused_golden(refused, quantization="fp8_per_tensor")
    assert line.startswith("LLaDAModelLM: model.layers.0.self_attn.q_proj cannot be served")
    assert "one dynamic scale per tensor" in line and "would change with the requests next to it" in line


def refused_golden(refused, **settings) -> str:
    from tests.conftest import GOLDEN

    return refused(GOLDEN / "checkpoints" / LLADA, "bfloat16", **settings)


@pytest.mark.parametrize("method", ["packed", "gptq", "awq"])
def test_int4_on_a_cpu_without_the_operator(refused, copy, monkeypatch, method):
    monkeypatch.setattr(quantization, "has_operator", lambda name: False)
    line = refused(copy(LLADA, method), "bfloat16")
    assert "model.layers.0.self_attn.q_proj" in line and "AVX-512" in line


def test_int8_on_a_cpu_whose_products_overflow(refused, copy, monkeypatch):
    monkeypatch.setattr(quantization, "int8_products_are_exact", lambda: False)
    line = refused(copy(LLADA, "int8"), "float32")
    assert "model.layers.0.self_attn.q_proj" in line and "VNNI" in line


@pytest.mark.parametrize(
    "name, method, tensor",
    [
        (LLADA, "int8", f"{PROJECTION}.weight_scale"),
        (LLADA, "gptq", f"{PROJECTION}.scales"),
        (LLADA, "awq", f"{PROJECTION}.qzeros"),
        (LLADA, "packed", f"{PROJECTION}.weight_packed"),
        (LLADA, "int8", "model.transformer.blocks.2.attn_norm.weight"),
        ("dream-tiny", "int8", "model.layers.2.self_attn.q_proj.bias"),
        (LLADA2, "int8", "model.layers.1.attention.query_key_value.weight_scale"),
        (LLADA2, "int8", "model.layers.2.mlp.experts.3.up_proj.weight_scale"),
    ],
)
def test_a_tensor_of_a_quantized_layer_is_missing(refused, copy, name, method, tensor):
    """vLLM would compute with whatever is in its memory."""
    line = refused(copy(name, method, lambda weights: weights.pop(tensor)), dtype_of(method))
    assert line.endswith(f": 1 tensor missing from the checkpoint: {tensor}")


@pytest.mark.parametrize("method", ["packed", "gptq"])
def test_tensors_that_no_kernel_reads_may_be_missing(engines, copy, method):
    def without(weights):
        for name in [name for name in weights if name.endswith(("weight_shape", "g_idx"))]:
            del weights[name]

    path = copy(LLADA, method, without)
    ((error, warned, _),) = engines(LLADA).collective_rpc(load, args=(str(path),), kwargs={"dtype": "bfloat16"})
    assert error is None and not warned.called


def changed(tensor: str, made):
    def change(weights):
        weights[tensor] = made(weights)

    return change


@pytest.mark.parametrize(
    "method, tensor, made, reason",
    [
        ("int8", f"{PROJECTION}.weight_scale", lambda w: torch.ones(7, 1), "is [7, 1], which does not fit"),
        ("gptq", f"{PROJECTION}.scales", lambda w: torch.ones(4, 7), "is [4, 7], which does not fit"),
        ("packed", f"{PROJECTION}.weight_zero_point", lambda w: torch.ones(16, 4).int(), "is not part of the method"),
        ("gptq", f"{PROJECTION}.g_idx", lambda w: torch.arange(128).flip(0).int() // 32, "is not part of the method"),
        (
            "int8",
            f"{PROJECTION}.weight",
            lambda w: torch.ones(128, 128),
            "is torch.float32, and by quantization_config",
        ),
        (
            "int8",
            "model.transformer.ff_out.weight",
            lambda w: torch.ones(512, 128, dtype=torch.int8),
            "is torch.int8, and by config.json it must be a float",
        ),
    ],
)
def test_a_tensor_is_not_what_the_config_says(refused, copy, method, tensor, made, reason):
    line = refused(copy(LLADA, method, changed(tensor, made)), dtype_of(method))
    assert line.startswith("LLaDAModelLM: ") and tensor in line and reason in line


def test_a_layer_is_left_as_it_is_under_the_names_of_the_checkpoint(engines, copy):
    """Names in quantization_config are those of the checkpoint, also of modules that this model splits or joins."""
    for name, method, layers in (
        (LLADA, "int8", ["blocks.0.ff_proj", "blocks.0.up_proj", "blocks.1.q_proj", "blocks.2.ff_out"]),
        (LLADA2, "int8", ["layers.1.attention.query_key_value", "layers.2.attention.dense"]),
    ):
        prefix = "model.transformer" if name == LLADA else "model"
        modules = [f"{prefix}.{layer}" for layer in layers]

        def floats(weights, modules=modules):
            for module in modules:
                scale = weights.pop(f"{module}.weight_scale")
                weights[f"{module}.weight"] = weights[f"{module}.weight"] * scale

        path = copy(name, method, floats, lambda described, modules=modules: described["ignore"].extend(modules))
        ((error, warned, _),) = engines(LLADA).collective_rpc(load, args=(str(path),), kwargs={"dtype": "float32"})
        assert error is None and not warned.called
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_experts_that_no_kernel_of_a_cpu_takes(refused, copy):
    line = refused(copy("lladamoe-tiny", "packed"), "bfloat16")
    assert line.startswith("LLaDAMoEModelLM: quantization compressed-tensors: No WNA16 MoE backend supports")


def test_a_shape_that_no_kernel_takes(refused, copy):
    """Groups that do not divide the inputs"""

    def other(described):
        described["group_size"] = 48

    line = refused(copy(LLADA, "gptq", config=other), "bfloat16")
    assert line.startswith("LLaDAModelLM: ")
