"""Measures how much the mask binds, over the queries that have a choice; computed in pieces like the attention."""

from dataclasses import dataclass

import torch

from vllm_dlm.kernels.soft_page_attention.gate import Gate, choices, parts, threshold
from vllm_dlm.kernels.soft_page_attention.torch import (
    by_key,
    log_of_mask,
    logits_of,
    page_scores,
    page_statistics,
    rows_at_once,
)


@dataclass
class Binding:
    """Sums over queries of all layers and heads; `shares` is reported."""

    rows: float = 0.0  # query heads with a choice
    pages: float = 0.0  # whole pages that queries see, per key head
    under: float = 0.0  # number of these pages under the threshold
    gates: float = 0.0  # sum of m over pages under the threshold
    weight: float = 0.0  # attention weight that pages under the threshold would get without a mask
    leaked: float = 0.0  # attention weight that they get with the mask

    def __iadd__(self, other: "Binding") -> "Binding":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def shares(self) -> dict[str, float]:
        rows, pages, under = max(self.rows, 1), max(self.pages, 1), max(self.under, 1)
        return {
            "pages_under_threshold": self.under / pages,
            "mean_gate_under_threshold": self.gates / under,
            "dense_weight_under_threshold": self.weight / rows,
            "masked_weight_under_threshold": self.leaked / rows,
        }


@torch.no_grad()
def measure(q: torch.Tensor, k: torch.Tensor, gate: Gate, scale: float, prompt_len: int = 0) -> Binding:
    """q [B, H, T, D], k [B, Hkv, N, D], as in soft_page_attention."""
    (batch, heads, count, _), (_, kv_heads, keys, _) = q.shape, k.shape
    grouped = q.unflatten(1, (kv_heads, heads // kv_heads))
    mean, spread = page_statistics(k, gate)
    total, first = Binding(), keys - count
    limit = rows_at_once(batch * heads, keys)
    for rows in parts(gate, first, keys, prompt_len, limit):
        if rows.dense:
            continue
        q = grouped[..., rows.start - first : rows.stop - first, :]
        choosable, keep = choices(gate, rows, keys, prompt_len, q.device)
        scores = page_scores(q, mean, spread, choosable, gate, scale, rows.together)
        log_mask = log_of_mask(scores, choosable, keep, gate)  # [B, Hkv, R or 1, pages]
        under = choosable & (scores < threshold(scores, choosable, keep)[..., None])
        logits = logits_of(q, k, scale, rows.start if gate.causal else None)  # [B, Hkv, G, R, N]
        hidden = by_key(under.to(logits.dtype), keys, gate.page_size)
        weight = (logits.softmax(-1) * hidden).sum()
        leaked = ((logits + by_key(log_mask, keys, gate.page_size)).softmax(-1) * hidden).sum()
        position = torch.arange(rows.start, rows.stop, device=q.device)
        seen = (position + 1) // gate.page_size if gate.causal else torch.full_like(position, keys // gate.page_size)
        each = 1 if not rows.together else len(rows)  # a shared choice counts once per query
        total += Binding(
            rows=batch * heads * len(rows),
            pages=batch * kv_heads * int(seen.sum()),
            under=each * int(under.sum()),
            gates=each * float(log_mask.exp()[under].sum()),
            weight=float(weight),
            leaked=float(leaked),
        )
    return total
