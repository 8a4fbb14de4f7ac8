"""What vLLM has compiled for GPUs and the parts need, in torch, on CPUs, under the schemas of the libraries."""

from itertools import pairwise

import torch

LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in ("_C", "_C_cache_ops", "_vllm_fa3_C")}

SCHEMAS = {
    "_C": (
        "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
        "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
        "silu_and_mul(Tensor! result, Tensor input) -> ()",
        "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
        "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()",
        # vLLM asks while it is imported
        "cutlass_scaled_mm_supports_fp8(int cuda_device_capability) -> bool",
        "cutlass_scaled_mm_supports_block_fp8(int cuda_device_capability) -> bool",
        "cutlass_group_gemm_supported(int cuda_device_capability) -> bool",
        "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()",
        "dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()",
        "dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()",
    ),
    "_C_cache_ops": (
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, "
        "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()",
    ),
    "_vllm_fa3_C": (
        "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, "
        "int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, "
        "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, "
        "Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, int window_size_right, "
        "float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, "
        "int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]",
        "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
        "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? leftpad_k, int? page_size, "
        "int max_seqlen_k_new, bool is_causal, int window_size_left, int window_size_right, bool has_softcap, "
        "int num_splits, bool? pack_gqa, int sm_margin) -> Tensor",
    ),
}

#: calls of FlashAttention 3, as its operator was given them
FLASH_CALLS: list[dict] = []


def register() -> None:
    for name, library in LIBRARIES.items():
        for schema in SCHEMAS[name]:
            library.define(schema)
            operator = schema.partition("(")[0]
            library.impl(operator, globals()[operator], "CompositeExplicitAutograd")


def rms_norm(result, input, weight, epsilon):
    x = input.float()
    x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(input.dtype)
    result.copy_(x if weight is None else x * weight)


def fused_add_rms_norm(input, residual, weight, epsilon):
    residual.add_(input)
    rms_norm(input, residual, weight, epsilon)


def silu_and_mul(result, input):
    gate, up = input.chunk(2, -1)
    result.copy_(torch.nn.functional.silu(gate) * up)


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, rope_dim_offset=0, inverse=False):
    assert is_neox and not rope_dim_offset and not inverse and cos_sin_cache.shape[1] == head_size
    cos, sin = cos_sin_cache[positions].float()[:, None].chunk(2, -1)  # [T, 1, D / 2] each
    for rows in (query, key):
        heads = rows.view(len(positions), -1, head_size)
        first, second = heads.float().chunk(2, -1)
        heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))


def cutlass_scaled_mm_supports_fp8(cuda_device_capability):
    return True


def cutlass_scaled_mm_supports_block_fp8(cuda_device_capability):
    return False


cutlass_group_gemm_supported = cutlass_scaled_mm_supports_block_fp8


def cutlass_scaled_mm(out, a, b, a_scales, b_scales, bias):
    """a [M, K] and its scales [M, 1]; b [K, N] and its scales [N, 1]"""
    assert a.dtype == b.dtype and a.is_contiguous() and b.stride(0) == 1, "the kernel reads inputs side by side"
    assert a_scales.shape == (len(a), 1) and b_scales.shape == (b.shape[1], 1) and b_scales.is_contiguous()
    product = (a.float() @ b.float()) * a_scales * b_scales.t()
    out.copy_(product if bias is None else product + bias)


def dynamic_per_token_scaled_fp8_quant(result, input, scale, scale_ub):
    assert scale_ub is None
    rows = input.float()
    scale.copy_((rows.abs().amax(1, keepdim=True) / 448).clamp_min(1 / (448 * 512)))
    result.copy_((rows / scale).to(torch.float8_e4m3fn))


def dynamic_scaled_int8_quant(result, input, scale, azp):
    assert azp is None
    rows = input.float()
    scale.copy_(rows.abs().amax(1, keepdim=True) / 127)
    result.copy_((rows / scale).round())


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    """key [T, Hkv, D] at least, caches [blocks, block_size, Hkv, D]"""
    block_size = key_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // block_size, slot % block_size] = key[token]
            value_cache[slot // block_size, slot % block_size] = value[token]


def get_scheduler_metadata(batch_size, *arguments):
    seqused_k, cu_seqlens_q = arguments[7], arguments[8]
    assert seqused_k.dtype == torch.int32 and cu_seqlens_q.dtype == torch.int32
    assert seqused_k.shape == (batch_size,) and cu_seqlens_q.shape == (batch_size + 1,)
    return torch.ones(1 + -(-batch_size // 4) * 16, dtype=torch.int32)


def fwd(
    q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
    max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
    q_descale, k_descale, v_descale, softmax_scale, is_causal, window_size_left, window_size_right, softcap,
    is_rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, s_aux, cp_world_size, cp_rank,
    cp_tot_seqused_k,
):  # fmt: skip
    """Attention as it is defined, after what the kernel's own checks ask of its arguments."""
    FLASH_CALLS.append(
        {"rows": len(q), "causal": is_causal, "splits": num_splits, "planned": scheduler_metadata is not None}
    )
    out = torch.empty_like(q) if out is None else out
    check_flash(q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table)
    starts = cu_seqlens_q.tolist()
    lengths = cu_seqlens_k.diff().tolist() if seqused_k is None else seqused_k.tolist()
    assert max(end - start for start, end in pairwise(starts)) <= max_seqlen_q
    assert max(lengths) <= max_seqlen_k, "keys beyond max_seqlen_k would not be read"
    for b, length in enumerate(lengths):
        rows = slice(starts[b], starts[b + 1])
        if rows.start == rows.stop:
            continue
        if page_table is None:
            first = int(cu_seqlens_k[b])
            keys, values = k[first : first + length], v[first : first + length]
        else:
            blocks = page_table[b, : -(-length // k.shape[1])].long()
            assert int(blocks.min()) >= 0 and int(blocks.max()) < len(k)
            keys, values = (part[blocks].flatten(0, 1)[:length] for part in (k, v))
        out[rows] = attention(q[rows], keys, values, softmax_scale, is_causal)
    nothing = q.new_empty(0)
    return [out, nothing, nothing, nothing]


def check_flash(q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, page_table) -> None:
    batch = len(cu_seqlens_q) - 1
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype == out.dtype
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v, out)), "channels lie side by side"
    assert q.shape == out.shape and len(q) >= int(cu_seqlens_q[-1])  # what is behind belongs to nobody
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.is_contiguous()
    assert (cu_seqlens_k is None) != (seqused_k is None)
    if seqused_k is not None:
        assert seqused_k.dtype == torch.int32 and seqused_k.shape == (batch,) and seqused_k.is_contiguous()
    else:
        assert cu_seqlens_k.dtype == torch.int32 and cu_seqlens_k.shape == (batch + 1,)
    if page_table is not None:
        assert page_table.dtype == torch.int32 and page_table.stride(-1) == 1 and len(page_table) == batch
        assert k.ndim == 4 and k.shape == v.shape and seqused_k is not None
    else:
        assert k.ndim == 3


def attention(q, keys, values, scale, causal):
    """q [L, H, D], keys and values [N, Hkv, D], the queries the last of them if causal -> [L, H, D]"""
    group, count = q.shape[1] // keys.shape[1], len(keys)
    q, keys, values = (part.transpose(0, 1).float() for part in (q, keys, values))
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    mask = torch.ones(q.shape[1], count, dtype=torch.bool).tril(count - q.shape[1]) if causal else None
    context = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    return context.transpose(0, 1)
