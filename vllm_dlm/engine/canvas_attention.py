"""Full attention inside each canvas of a packed batch, by the fastest kernel the device has."""

from dataclasses import dataclass, field
from functools import cache

import torch

from vllm_dlm.kernels.delta_attention import delta_attention
from vllm_dlm.kernels.paged_attention import gather, paged_attention
from vllm_dlm.kernels.varlen_attention import varlen_attention


@cache
def flash_attention():
    """vLLM's varlen FlashAttention, or None. Read in vLLM 0.32: vllm_flash_attn."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@dataclass
class CanvasAttention:
    """One forward's layout: canvas i has `q_lens[i]` query rows and `kv_lens[i]` key rows."""

    q_lens: list[int]
    kv_lens: list[int]
    scale: float
    _starts: dict = field(default_factory=dict)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [Tq, H, D], k and v [Tk, Hkv, D] -> context [Tq, H * D]"""
        flash = flash_attention() if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else None
        if flash is None:
            return varlen_attention(q, k, v, self.q_lens, self.kv_lens, self.scale).flatten(1)
        context = flash(
            q,
            k,
            v,
            cu_seqlens_q=self._cumulative("q", self.q_lens, q.device),
            cu_seqlens_k=self._cumulative("kv", self.kv_lens, q.device),
            max_seqlen_q=max(self.q_lens),
            max_seqlen_k=max(self.kv_lens),
            softmax_scale=self.scale,
            causal=False,
        )
        return context.flatten(1)

    def over_pages(self, q: torch.Tensor, pages: torch.Tensor, tables: list[torch.Tensor]) -> torch.Tensor:
        """q [Tq, H, D] over the cached keys of each canvas -> context [Tq, H * D]"""
        flash = flash_attention() if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else None
        if flash is None:
            return paged_attention(q, pages, tables, self.q_lens, self.kv_lens, self.scale).flatten(1)
        keys, values = pages.transpose(1, 2).chunk(2, -1)  # [blocks, block_size, Hkv, D]
        context = flash(
            q,
            keys,
            values,
            cu_seqlens_q=self._cumulative("q", self.q_lens, q.device),
            seqused_k=torch.tensor(self.kv_lens, dtype=torch.int32, device=q.device),
            max_seqlen_q=max(self.q_lens),
            max_seqlen_k=max(self.kv_lens),
            block_table=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(torch.int32),
            softmax_scale=self.scale,
            causal=False,
        )
        return context.flatten(1)

    def delta_over_pages(
        self,
        q: torch.Tensor,
        pages: torch.Tensor,
        tables: list[torch.Tensor],
        changed: torch.Tensor,
        moved: torch.Tensor,
        counts: list[int],
    ) -> torch.Tensor:
        """What the `moved` values [S, Hkv, D] of the `changed` positions [S] add to each query's context;
        canvas i has `counts[i]` of them -> [Tq, H * D]"""
        parts = zip(q.split(self.q_lens), tables, self.kv_lens, changed.split(counts), moved.split(counts), strict=True)
        added = []
        for query, table, length, positions, values in parts:
            keys = gather(pages, table, length)[0]
            added.append(delta_attention(query, keys, keys[:, positions], values, self.scale))
        return torch.cat(added).flatten(1)

    def _cumulative(self, name: str, lengths: list[int], device) -> torch.Tensor:
        """Offsets on the device, uploaded once per forward and not once per layer."""
        if name not in self._starts:
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            self._starts[name] = offsets.to(device=device, dtype=torch.int32, non_blocking=True)
        return self._starts[name]
