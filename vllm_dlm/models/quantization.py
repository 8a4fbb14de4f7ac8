"""Quantized weights: rejects unsupported methods, and splits fused projections in each checkpoint layout.

Quantization and products are vLLM's. Read in vLLM 0.32: model_executor/layers/quantization (auto_awq.py,
auto_gptq.py, fp8.py, compressed_tensors/), model_executor/kernels/linear (`ScaledMMLinearKernel`, `MPLinearKernel`),
model_executor/layers/fused_moe/config.py (`FusedMoEQuantConfig`).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear import CPUInt8ScaledMMLinearKernel, MPLinearKernel, ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.base import MMLinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8PerTensorScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.marlin import MarlinFP8ScaledMMLinearKernel
from vllm.model_executor.layers.quantization import QuantizationConfig

KERNELS = (MPLinearKernel, ScaledMMLinearKernel, MMLinearKernel)
#: kernels that multiply fp8 weights with activations that are not quantized
WEIGHT_ONLY = (MarlinFP8ScaledMMLinearKernel, CPUFp8PerTensorScaledMMLinearKernel)
SHARED_SCALE = (
    "its activations have one dynamic scale per tensor, which depends on the other rows of the batch, so an answer "
    "would change with the requests next to it; quantize activations per token, per group or with static scales"
)
NO_INT8 = (
    "this CPU has no VNNI instructions, so oneDNN would add pairs of int8 products in 16 bits and overflow; "
    "use bfloat16 or float32 weights on this CPU"
)
NO_INT4 = (
    "int4 weights with 16-bit activations need vLLM's operator cpu_gemm_wna16, which its build for this CPU does not "
    "have (it needs AVX-512)"
)
#: attributes of vLLM's quantization configs that name modules, as lists or keys
LISTS = ("ignore", "target_scheme_map", "ignored_layers", "modules_to_not_convert", "modules_in_block_to_quantize")


def spelled_out(config: QuantizationConfig, fused: dict[str, list[str]]) -> None:
    """Replaces names of fused modules by the names of their parts."""
    for attribute in LISTS:
        names = getattr(config, attribute, None) or []
        for whole, parts in fused.items():
            pairs = [
                (name.replace(whole, part), name) for name in names for part in (parts if whole in name else [whole])
            ]
            names = {new: names[old] for new, old in pairs} if isinstance(names, dict) else [new for new, _ in pairs]
        if names:
            setattr(config, attribute, names)


@contextmanager
def named_errors(architecture: str, config: QuantizationConfig | None) -> Iterator[None]:
    """Converts vLLM's errors about quantized layers to one line that names the method."""
    try:
        yield
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        if config is None or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{architecture}: quantization {config.get_name()}: {reason}") from error


def kernels_of(module: nn.Module) -> Iterator[Any]:
    """vLLM's kernels of a linear layer, from its method or its compressed-tensors scheme"""
    for holder in (getattr(module, "quant_method", None), getattr(module, "scheme", None)):
        if holder is not None:
            yield from (value for value in vars(holder).values() if isinstance(value, KERNELS))


def refuse_unsupported(model: nn.Module, architecture: str) -> None:
    """Raises an error for the first module with a method that would give wrong answers or fail in the first step.

    Linear layers have kernels when the model is built, experts only after loading."""
    for name, module in model.named_modules():
        if reason := _reason(module):
            raise ValueError(f"{architecture}: {name} cannot be served with these quantized weights: {reason}")


def _reason(module: nn.Module) -> str | None:
    for kernel in kernels_of(module):
        key = getattr(kernel.config, "activation_quant_key", None)
        scale = None if key is None or isinstance(kernel, WEIGHT_ONLY) else key.scale
        if scale is not None and not scale.static and scale.group_shape.is_per_tensor():
            return SHARED_SCALE
        if isinstance(kernel, CPUWNA16LinearKernel) and not has_operator("cpu_gemm_wna16"):
            return NO_INT4
        if isinstance(kernel, CPUInt8ScaledMMLinearKernel) and not int8_products_are_exact():
            return NO_INT8
    experts = getattr(getattr(module, "quant_method", None), "moe_quant_config", None)
    if experts is not None and isinstance(experts.quant_dtype, torch.dtype):  # fp8 or int8 activations
        per_row = experts.is_per_act_token or experts.is_block_quantized
        if not per_row and experts.a1_scale is None:
            return SHARED_SCALE
    return None


def has_operator(name: str) -> bool:
    return hasattr(torch.ops._C, name)


@functools.cache
def int8_products_are_exact() -> bool:
    """Whether vLLM's CPU kernel adds products of int8 numbers without overflow, tested with the largest numbers"""
    if torch.cpu._is_amx_tile_supported():
        return True
    size = 64
    largest = torch.full((size, size), 127, dtype=torch.int8)
    one_each, product = torch.ones(size, 1), torch.empty(size, size)
    kernel = ops.create_onednn_scaled_mm(largest.t(), one_each, product.dtype, True, False, 1)
    adjustment = largest.sum(0, keepdim=True, dtype=torch.float32)  # unused by symmetric activations, as in vLLM
    ops.onednn_scaled_mm(kernel, largest, product, one_each, None, adjustment, None)
    return bool((product == 127 * 127 * size).all())


#: dimension of the output channels in the tensors of a linear layer; compressed-tensors and fp8, then GPTQ and AWQ
OUTPUT_DIM = dict.fromkeys(("weight", "weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point"), 0)
OUTPUT_DIM |= dict.fromkeys(("qweight", "qzeros", "scales"), 1)
#: AWQ's order of eight channels in an int32, from the lowest bits
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class FusedChannels:
    """Output channels of a fused projection: the indices of each part's channels, in its order"""

    parts: tuple[torch.Tensor, ...]
    awq: bool = False

    @property
    def count(self) -> int:
        return sum(map(len, self.parts))

    def split(self, leaf: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """`leaf`: name of the tensor without its module -> the tensor of each part"""
        if leaf == "weight_shape":  # compressed-tensors: [output channels, input channels]
            return [torch.stack([tensor.new_tensor(len(part)), tensor[1]]) for part in self.parts]
        if tensor.numel() == 1:  # one scale for the whole projection
            return [tensor] * len(self.parts)
        dim = OUTPUT_DIM.get(leaf)
        if dim is None or tensor.ndim <= dim:
            raise ValueError(f"{leaf} {list(tensor.shape)} of a fused projection cannot be split into its parts")
        length, count = tensor.shape[dim], self.count
        if length == count:
            return [tensor.index_select(dim, part) for part in self.parts]
        if tensor.dtype == torch.int32 and length and count % length == 0:
            return self._packed(tensor, dim, count // length)
        if length and count % length == 0:
            return [tensor.index_select(dim, blocks) for blocks in self._blocks(leaf, count // length)]
        raise ValueError(f"{leaf} of a fused projection has {length} output channels and must have {count}")

    def _packed(self, tensor: torch.Tensor, dim: int, factor: int) -> list[torch.Tensor]:
        """`factor` channels in each int32"""
        bits = 32 // factor
        place = torch.tensor(AWQ_ORDER if self.awq else range(factor))
        shifts = place * bits
        words = tensor.movedim(dim, -1).long() & 0xFFFFFFFF  # [..., channels / factor]
        channels = ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)  # [..., channels]
        found = []
        for part in self.parts:
            if len(part) % factor:
                raise ValueError(f"a part of {len(part)} channels cannot be packed by {factor}")
            own = channels.index_select(-1, part).unflatten(-1, (-1, factor))
            packed = (own << shifts).sum(-1)
            packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
            found.append(packed.movedim(-1, dim).contiguous())
        return found

    def _blocks(self, leaf: str, size: int) -> Iterator[torch.Tensor]:
        """Indices of each part's blocks of `size` channels. Parts must consist of whole blocks."""
        for part in self.parts:
            blocks = (part // size).unflatten(0, (-1, size)) if len(part) % size == 0 else None
            if blocks is None or (blocks != blocks[:, :1]).any():
                raise ValueError(
                    f"{leaf} of a fused projection has one scale for {size} output channels, but its parts do not "
                    f"consist of whole blocks; quantize it per channel, or in blocks of whole heads"
                )
            yield blocks[:, 0]


def neutral(leaf: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor without a parameter has no effect: an activation order equal to the input order, or zero points
    and biases of 0."""
    if leaf.endswith("g_idx"):
        return not (tensor.diff() < 0).any()
    return not tensor.float().any()
