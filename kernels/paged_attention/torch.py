"""One gather of whole pages and one scaled_dot_product_attention per sequence."""

import torch

from vllm_dlm.kernels.varlen_attention.torch import attend


def gather(pages: torch.Tensor, table: torch.Tensor, kv_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one sequence, each [Hkv, N, D]; head-major, so that a page of a head moves as one piece."""
    blocks, kv_heads, size, width = pages.shape
    head = torch.arange(kv_heads, device=table.device)
    index = (table[None, :] * kv_heads + head[:, None]).flatten()  # (head, page) order
    kv = pages.view(blocks * kv_heads, size, width).index_select(0, index).view(kv_heads, -1, width)[:, :kv_len]
    return kv.chunk(2, -1)


def paged_attention(q, pages, tables, q_lens, kv_lens, scale):
    out = torch.empty_like(q)
    parts = zip(q.split(list(q_lens)), out.split(list(q_lens)), tables, kv_lens, strict=True)
    for query, place, table, kv_len in parts:
        if len(query):
            place.copy_(attend(query, *gather(pages, table, kv_len), scale))
    return out
