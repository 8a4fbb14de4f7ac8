"""Computes queries, keys and values of a layer in one matrix product.

Reuse policies may compute them for different rows, so each remains a linear layer. Their weights are slices of one
tensor. Read in vLLM 0.32: kernels/linear/scaled_mm (cutlass.py, pytorch.py) with weights [in, out] (inputs consecutive)
and scales [out, 1]; layers/quantization/online/fp8.py (`Fp8PtpcOnlineLinearMethod`) and
compressed_tensors/compressed_tensors.py (`CompressedTensorsLinearMethod`), which hold them.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, combinations

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.kernels.linear import (
    ChannelWiseTorchFP8ScaledMMLinearKernel,
    CutlassFP8ScaledMMLinearKernel,
    CutlassInt8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_dlm.models.quantization import kernels_of

#: kernels with one scale per row and per output channel, so channels of layers can be joined
JOINABLE = (
    ChannelWiseTorchFP8ScaledMMLinearKernel,
    CutlassFP8ScaledMMLinearKernel,
    CutlassInt8ScaledMMLinearKernel,
)
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class JoinedProjections:
    """`widths`: output channels of each projection; `products`: for each run of consecutive projections"""

    widths: dict[str, int]
    products: dict[str, Product]

    def __call__(self, names: str, h_TE: torch.Tensor) -> list[torch.Tensor]:
        """`names`: consecutive letters of "qkv" -> [T, width] each"""
        product = self.products[names](h_TE)
        return list(product.split([self.widths[name] for name in names], -1)) if len(names) > 1 else [product]

    @classmethod
    def of(cls, projections: dict[str, nn.Module]) -> "JoinedProjections | None":
        """Returns None if these weights cannot be joined."""
        layers = list(projections.values())
        if all(isinstance(layer.quant_method, UnquantizedLinearMethod) for layer in layers):
            made = _plain
        elif all(_can_join(layer) for layer in layers):
            made = _scaled
        else:
            return None
        widths = {name: layer.output_size_per_partition for name, layer in projections.items()}
        ends = dict(zip(["", *projections], accumulate([0, *widths.values()]), strict=True))
        names = "".join(projections)
        places = combinations(range(len(names) + 1), 2)
        runs = {names[a:b]: slice(ends[names[:a][-1:]], ends[names[b - 1]]) for a, b in places}
        return cls(widths, made(layers, runs))


def _plain(layers: list[nn.Module], runs: dict[str, slice]) -> dict[str, Product]:
    weight, bias = torch.cat([layer.weight.data for layer in layers]), _joined_bias(layers)  # [out, in], [out]
    _become_slices(layers, "weight", weight.split([len(layer.weight) for layer in layers]))
    own = {names: (weight[run], None if bias is None else bias[run]) for names, run in runs.items()}
    return {names: functools.partial(linear, *own) for names, own in own.items()}


def linear(weight: torch.Tensor, bias: torch.Tensor | None, h_TE: torch.Tensor) -> torch.Tensor:
    return F.linear(h_TE, weight, bias)


def apply(layer: nn.Module, bias: torch.Tensor | None, h_TE: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, h_TE, bias)


def _can_join(layer: nn.Module) -> bool:
    kernels = list(kernels_of(layer))
    shape, scale = getattr(layer, "weight", torch.empty(0)).shape, getattr(layer, "weight_scale", None)
    dynamic = all(getattr(layer, name, None) is None for name in ("input_scale", "input_zero_point", "azp_adj"))
    in_channels = scale is not None and scale.shape == (layer.output_size_per_partition, 1)
    padded = shape != (layer.input_size_per_partition, layer.output_size_per_partition)
    return len(kernels) == 1 and isinstance(kernels[0], JOINABLE) and dynamic and in_channels and not padded


def _scaled(layers: list[nn.Module], runs: dict[str, slice]) -> dict[str, Product]:
    whole = torch.cat([layer.weight.data.t() for layer in layers])  # [out, in]
    scale = torch.cat([layer.weight_scale.data for layer in layers])  # [out, 1]
    bias = _joined_bias(layers)
    sizes = [layer.output_size_per_partition for layer in layers]
    _become_slices(layers, "weight", [part.t() for part in whole.split(sizes)])
    _become_slices(layers, "weight_scale", scale.split(sizes))
    found: dict[str, Product] = {}
    for names, run in runs.items():
        layer = with_own_kernel(layers[0], run.stop - run.start)
        layer._parameters |= {
            name: nn.Parameter(part, requires_grad=False)
            for name, part in (("weight", whole[run].t()), ("weight_scale", scale[run]))
        }
        part = None if bias is None else bias[run]
        found[names] = functools.partial(apply, layer, part)
    return found


def with_own_kernel(layer: nn.Module, width: int) -> nn.Module:
    """A shallow copy of a linear layer that has `width` output channels and whose parameters can be replaced"""
    layer = copy.copy(layer)
    layer._parameters = dict(layer._parameters)
    layer.quant_method = method = copy.copy(layer.quant_method)
    holder = method
    if getattr(layer, "scheme", None) is not None:
        layer.scheme = holder = copy.copy(layer.scheme)
    for name, value in vars(holder).items():
        if isinstance(value, JOINABLE):
            kernel = copy.copy(value)
            if hasattr(kernel, "logical_output_size"):
                kernel.logical_output_size = width
            setattr(holder, name, kernel)
            return layer
    raise AssertionError("only layers with a kernel are joined")


def _joined_bias(layers: list[nn.Module]) -> torch.Tensor | None:
    """[out]; the layers' biases become slices of it"""
    if layers[0].bias is None:
        return None
    bias = torch.cat([layer.bias.data for layer in layers])
    _become_slices(layers, "bias", bias.split([len(layer.bias) for layer in layers]))
    return bias


def _become_slices(layers: list[nn.Module], name: str, parts) -> None:
    for layer, part in zip(layers, parts, strict=True):
        getattr(layer, name).data = part
