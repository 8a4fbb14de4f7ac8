"""vLLM's CPU operators for int8 and int4 weights and quantized experts, in plain torch, on CPUs that cannot run them.

int8 needs VNNI, int4 AVX-512, experts AMX. Loading, shards and scales are vLLM's own either way. Read in vLLM 0.32:
kernels/linear/mixed_precision/cpu.py, layers/fused_moe/experts/cpu_moe.py and oracle/int_wna16.py.
"""

import functools

import torch
import torch.nn.functional as F

from tests.quantization.checkpoints import AWQ_ORDER, rounded_int8
from vllm_dlm.models import quantization


@functools.cache
def provide() -> None:
    """Defines what is missing, once per process and before an engine needs it."""
    import vllm._custom_ops
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(
            "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, "
            "Tensor? bias, SymInt pack_factor, str isa_hint) -> ()"
        )
        library.impl("cpu_gemm_wna16", cpu_gemm_wna16, "CPU")
        provide.library = library
    if not quantization.int8_products_are_exact():
        vllm._custom_ops.create_onednn_scaled_mm = Int8Weights
        vllm._custom_ops.onednn_scaled_mm = onednn_scaled_mm
        quantization.int8_products_are_exact.cache_clear()
        assert quantization.int8_products_are_exact()
    if not torch.cpu._is_amx_tile_supported():
        for experts in (cpu_moe.CPUExpertsInt8, cpu_moe.CPUExpertsInt4):
            experts._supports_current_device = staticmethod(lambda: True)
        cpu_moe.CPUExpertsInt8.process_weights_after_loading = lambda self, layer: None
        cpu_moe.convert_weight_packed_scale_zp = lambda weight, zeros, scales, algorithm: (
            unpacked_experts(weight, zeros, scales, algorithm == cpu_moe.CPUQuantAlgo.AWQ),
            zeros,
            scales,
        )
        cpu_moe.fused_experts_cpu = fused_experts


class Int8Weights:
    """Stands for oneDNN's handle of a matrix [in, out]."""

    def __init__(self, weight, weight_scales, output_type, dynamic_quant, use_azp, primitive_cache_size):
        assert dynamic_quant and not use_azp
        self.weight, self.scale, self.n = weight.float(), weight_scales.float().reshape(1, -1), weight.shape[1]


def onednn_scaled_mm(handler, x, output, input_scale, input_zp, input_zp_adj, bias) -> None:
    """Sums of whole numbers are exact in float32 up to 1,040 inputs."""
    assert len(handler.weight) <= 1040 and input_zp is None
    product = x.float() @ handler.weight * input_scale * handler.scale
    output.copy_(product if bias is None else product + bias)


def numbers(word: torch.Tensor, order=range(8)) -> torch.Tensor:
    """Eight numbers from 0 to 15 of each int32, in the order of channels: [..., n] -> [..., 8 n]"""
    place = torch.tensor(sorted(range(8), key=list(order).__getitem__))
    return ((word.unsqueeze(-1) >> (place * 4).to(word.dtype)) & 15).flatten(-2)


def cpu_gemm_wna16(x, q_weight, output, scales, zeros, bias, pack_factor, isa_hint) -> None:
    """`q_weight` [out / 16, 2 in]: of each input, the words of 16 output channels; `scales` [groups, out]"""
    inputs = x.shape[1]
    whole = numbers(q_weight.view(-1, inputs, 2)).permute(1, 0, 2).flatten(1)  # [in, out]
    zero = 8 if zeros is None else numbers(zeros)  # [groups, out]
    output.copy_(F.linear(x, multiplied(whole, zero, scales).to(x.dtype).t(), bias))


def multiplied(whole: torch.Tensor, zero, scales: torch.Tensor) -> torch.Tensor:
    """[in, out], of groups of inputs"""
    by_group = whole.unflatten(0, (len(scales), -1)) - (zero.unsqueeze(1) if isinstance(zero, torch.Tensor) else zero)
    return (by_group * scales.float().unsqueeze(1)).flatten(0, 1)


def unpacked_experts(weight, zeros, scales, awq: bool) -> torch.Tensor:
    """GPTQ: [E, in / 8, out], zero points one less than they mean; AWQ: [E, in, out / 8] -> [E, out, in] floats"""
    if awq:
        whole, zero = numbers(weight, AWQ_ORDER), numbers(zeros, AWQ_ORDER)
    else:
        whole, zero = numbers(weight.transpose(1, 2)).transpose(1, 2), numbers(zeros) + 1
    return torch.stack([multiplied(*expert).t() for expert in zip(whole, zero, scales, strict=True)])


def fused_experts(out, x, w1, w2, weights, chosen, method, w1_scale, w2_scale, *_) -> None:
    """Activations in int8 with one scale per row, as in vLLM's kernels; int4 weights are floats already"""
    if w1.dtype == torch.int8:
        w1, w2 = w1 * w1_scale.reshape(*w1.shape[:2], 1), w2 * w2_scale.reshape(*w2.shape[:2], 1)
    total = torch.zeros_like(out, dtype=torch.float32)
    for expert in chosen.unique().tolist():
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (rounded_int8(x[rows].float()) @ w1[expert].float().t()).chunk(2, -1)
        made = rounded_int8(F.silu(gate) * up) @ w2[expert].float().t()
        total.index_add_(0, rows, made * weights[rows, place].unsqueeze(1).float())
    out.copy_(total)
