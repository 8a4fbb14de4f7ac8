"""vLLM's FlashAttention over packed queries that see every key, as one operator of PyTorch's.

The definition is that of kernels/varlen_attention, over keys that lie side by
side or in pages. Read in vLLM 0.32 and 0.33: vllm_flash_attn/flash_attn_interface.py,
v1/attention/backends/fa_utils.py.
"""

import functools

import torch

_LIBRARY = torch.library.Library("vllm_dlm", "FRAGMENT")
_LIBRARY.define(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor? k_starts, Tensor? kv_lens, "
    "Tensor? table, int max_q, int max_kv, float scale) -> Tensor"
)


def has_flash(q: torch.Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and installed()


@functools.cache
def installed() -> bool:
    try:
        import vllm.vllm_flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def flash_attention(
    q: torch.Tensor,  # [Tq, H, D], the queries of canvas after canvas
    k: torch.Tensor,  # [Tk, Hkv, D], or pages [blocks, block_size, Hkv, D]
    v: torch.Tensor,
    q_starts: torch.Tensor,  # [C + 1] int32
    k_starts: torch.Tensor | None,  # [C + 1] int32 of keys that lie side by side
    kv_lens: torch.Tensor | None,  # [C] int32 of keys in pages
    table: torch.Tensor | None,  # [C, blocks] int32
    max_q: int,
    max_kv: int,
    scale: float,
) -> torch.Tensor:
    """-> [Tq, H, D]. Rows behind the last start are left alone."""
    if not len(q):  # no kernel takes none
        return q
    return torch.ops.vllm_dlm.flash_attention(q, k, v, q_starts, k_starts, kv_lens, table, max_q, max_kv, scale)


def _launch(q, k, v, q_starts, k_starts, kv_lens, table, max_q, max_kv, scale):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=q_starts, cu_seqlens_k=k_starts, seqused_k=kv_lens, block_table=table,
        max_seqlen_q=max_q, max_seqlen_k=max_kv, softmax_scale=scale, causal=False, fa_version=_version(q.shape[2]),
    )  # fmt: skip


@functools.cache
def _version(head_size: int) -> int:
    """What the device has code for; the function's own default has none for SM90."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_size) or 2


_LIBRARY.impl("flash_attention", _launch, "CUDA")
torch.library.register_fake("vllm_dlm::flash_attention", lambda q, *rest: q.new_empty(q.shape), lib=_LIBRARY)
