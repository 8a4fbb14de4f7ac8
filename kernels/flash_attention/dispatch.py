"""Where it runs: on CUDA, in half precision."""

import functools

import torch

from vllm_dlm.kernels.operators import operator

_flash_attention = operator(
    "flash_attention(Tensor q, Tensor k, Tensor v, Tensor q_starts, Tensor? k_starts, Tensor? kv_lens, "
    "Tensor? table, int max_q, int max_kv, float scale) -> Tensor",
    __package__,
    lambda q, *rest: q.new_empty(q.shape),
    module="vllm",
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
    if not len(q):
        return q
    return _flash_attention(q, k, v, q_starts, k_starts, kv_lens, table, max_q, max_kv, scale)
