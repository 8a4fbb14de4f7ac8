"""Quantized copies of the tiny checkpoints in the layouts of compressed-tensors, GPTQ and AWQ, and float copies that
hold the values which the quantized ones stand for."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN

GROUP = 32  # input channels that share a scale of int4 weights
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # channel at each place of an int32, from the lowest bits
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quantized:
    """One weight: its tensors in the checkpoint's layout, and the values they stand for, [out, in]"""

    tensors: Tensors
    values: torch.Tensor


def int8(weight: torch.Tensor) -> Quantized:
    scale = weight.abs().amax(1, keepdim=True) / 127  # [out, 1]
    whole = (weight / scale).round()
    return Quantized({"weight": whole.to(torch.int8), "weight_scale": scale}, whole * scale)


def fp8(weight: torch.Tensor) -> Quantized:
    scale = weight.abs().amax(1, keepdim=True) / 448
    small = (weight / scale).to(torch.float8_e4m3fn)
    return Quantized({"weight": small, "weight_scale": scale}, small.float() * scale)


def grouped(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> whole numbers from 0 to 15 around 8 [out, in], and scales [out, groups] that bfloat16 holds"""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / 7).bfloat16().float()
    whole = (groups / scale.unsqueeze(2)).round().clamp(-8, 7) + 8
    return whole.flatten(1).long(), scale


def packed(weight: torch.Tensor) -> Quantized:
    """compressed-tensors: eight input channels in an int32"""
    whole, scale = grouped(weight)
    tensors = {"weight_packed": words(whole), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return Quantized(tensors, values(whole - 8, scale))


def gptq(weight: torch.Tensor) -> Quantized:
    """Eight input channels in an int32, all transposed; its zero points are one less than they mean"""
    whole, scale = grouped(weight)
    out, inputs = weight.shape
    tensors = {
        "qweight": words(whole).t().contiguous(),  # [in / 8, out]
        "qzeros": words(torch.full((inputs // GROUP, out), 7)),  # [groups, out / 8]
        "scales": scale.t().contiguous(),  # [groups, out]
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }
    return Quantized(tensors, values(whole - 8, scale))


def awq(weight: torch.Tensor) -> Quantized:
    """Eight output channels in an int32 in AWQ's order, with zero points"""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale = ((high - low) / 15).bfloat16().float()  # [out, groups]
    zero = (-low / scale).round().clamp(0, 15)
    whole = ((groups / scale.unsqueeze(2)).round() + zero.unsqueeze(2)).clamp(0, 15).flatten(1)
    tensors = {
        "qweight": words(whole.t().long(), AWQ_ORDER),  # [in, out / 8]
        "qzeros": words(zero.t().long(), AWQ_ORDER),  # [groups, out / 8]
        "scales": scale.t().contiguous(),  # [groups, out]
    }
    return Quantized(tensors, values(whole - zero.repeat_interleave(GROUP, 1), scale))


def words(whole: torch.Tensor, order=range(8)) -> torch.Tensor:
    """Eight numbers from 0 to 15 of each row in an int32: [rows, n] -> [rows, n / 8]"""
    eights = whole.unflatten(1, (-1, 8))[..., list(order)]
    word = (eights << torch.arange(0, 32, 4)).sum(2)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def values(whole: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return whole * scale.repeat_interleave(GROUP, 1)


def rounded_int8(x: torch.Tensor) -> torch.Tensor:
    """Activations as W8A8 has them: one scale per row"""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-7) / 127
    return ((x.float() / scale).round() * scale).to(x.dtype)


def rounded_fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-7) / 448
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def compressed(kind: str, bits: int, weights: dict, inputs: dict | None, stored: str) -> dict:
    common = {"num_bits": bits, "type": kind, "symmetric": True}
    group = {"targets": ["Linear"], "weights": common | weights | {"dynamic": False}}
    if inputs is not None:
        group["input_activations"] = {"num_bits": 8, "type": kind, "symmetric": True} | inputs
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


PER_ROW = {"strategy": "token", "dynamic": True}
#: name -> (how a weight is quantized, quantization_config, the engine's dtype)
METHODS = {
    "int8": (int8, compressed("int", 8, {"strategy": "channel"}, PER_ROW, "int-quantized"), "float32"),
    "fp8": (fp8, compressed("float", 8, {"strategy": "channel"}, PER_ROW, "float-quantized"), "bfloat16"),
    "packed": (
        packed,
        compressed("int", 4, {"strategy": "group", "group_size": GROUP}, None, "pack-quantized"),
        "bfloat16",
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
        "bfloat16",
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "bfloat16",
    ),
}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is a matrix of a layer; routers keep their precision"""
    of_layer = ".blocks." in name or ".layers." in name
    return of_layer and tensor.ndim == 2 and name.endswith(".weight") and not name.endswith(".gate.weight")


@cache
def pair(source: str | Path, method: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of tests/golden, or a folder -> a quantized copy, and a copy with the values it stands for"""
    quantize, described, _ = METHODS[method]
    path = GOLDEN / "checkpoints" / source if isinstance(source, str) else source
    small, plain = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if is_linear(name, tensor):
            made = quantize(tensor.float())
            small |= {f"{name.removesuffix('weight')}{leaf}": own.contiguous() for leaf, own in made.tensors.items()}
            plain[name] = made.values.contiguous()
        else:
            small[name] = plain[name] = tensor
    pair = folder / f"{path.name}-{method}", folder / f"{path.name}-{method}-values"
    for copy, tensors, more in zip(pair, (small, plain), ({"quantization_config": described}, {}), strict=True):
        write(path, copy, tensors, more)
    return pair


def write(path: Path, copy: Path, tensors: Tensors, more: dict) -> None:
    copy.mkdir()
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, copy)
    config = json.loads((path / "config.json").read_text()) | more
    (copy / "config.json").write_text(json.dumps(config))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
