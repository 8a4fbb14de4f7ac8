"""The definition, in float64, one request and one key head at a time."""

from typing import Literal, get_args

import torch

Reduction = Literal["max", "mean", "softmax_sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
#: the score of a page that is read whatever it promises, and of one whose score is not a number
FORCED, LOWEST = 1e30, -1e30


def page_scores(q, q_starts, statistics, page_table, num_pages, forced_from, sink_pages, lam, reduce):
    """See dispatch.py; -> [B, Hkv, N] float64"""
    batch, width = page_table.shape
    kv_heads, dim = statistics.mean.shape[1], q.shape[2]
    group = q.shape[1] // kv_heads
    out = torch.full((batch, kv_heads, width), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        count = int(num_pages[b])
        table = page_table[b, :count].long()
        position = torch.arange(count)
        for h in range(kv_heads):
            queries = q[q_starts[b] : q_starts[b + 1], h * group : (h + 1) * group].double().flatten(0, 1)  # [R, D]
            mean, spread = statistics.mean[table, h, 0].double(), statistics.spread[table, h, 0].double()
            forced = (position < sink_pages) | (position >= int(forced_from[b])) | spread.isinf().any(-1)
            spread = spread.masked_fill(spread.isinf(), 0.0)
            logits = (queries @ mean.T) / dim**0.5  # [R, count]
            if statistics.std_kind == "vector":
                logits += lam * (queries.abs() @ spread.T) / dim**0.5
            elif statistics.std_kind == "diag2":
                energy = torch.stack([part.square().sum(-1) for part in queries.tensor_split(spread.shape[-1], -1)], -1)
                logits += lam * (energy @ spread.T) / dim
            else:
                logits += lam * queries.norm(dim=-1, keepdim=True) * spread.T / dim**0.5
            if reduce == "max":
                score = logits.amax(0)
            elif reduce == "mean":
                score = logits.mean(0)
            else:
                candidates = logits.masked_fill(forced | logits.isnan(), -torch.inf)
                score = candidates.softmax(-1).nan_to_num(0.0).sum(0)
                score = score.masked_fill(logits.isnan().any(0), torch.nan)
            score = score.masked_fill(score.isnan(), LOWEST).clamp(LOWEST, FORCED / 10)
            out[b, h, :count] = score.masked_fill(forced, FORCED)
    return out
