"""One product of all queries of a request with its pages' means, and one with their spreads.

Requests of equally many queries are scored together. Rows are the queries of
the heads that share a key head.
"""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import GROUPS
from vllm_dlm.kernels.page_scores.naive import FORCED, LOWEST


def page_scores(q, q_starts, statistics, page_table, num_pages, forced_from, sink_pages, lam, reduce):
    """See choice.py"""
    batch, width = page_table.shape
    kv_heads, heads, dim = statistics.mean.shape[1], q.shape[1], q.shape[2]
    counts = q_starts.diff().tolist()
    if len(set(counts)) > 1:
        parts = [
            page_scores(
                q[start : start + n], torch.tensor([0, n]), statistics, page_table[b : b + 1], num_pages[b : b + 1],
                forced_from[b : b + 1], sink_pages, lam, reduce,
            )
            for b, (start, n) in enumerate(zip(q_starts.tolist(), counts, strict=False))
        ]
        return torch.cat(parts)
    table = page_table.flatten()
    mean = statistics.mean[:, :, 0].index_select(0, table).view(batch, width, kv_heads, dim)
    spread = statistics.spread[:, :, 0].index_select(0, table).view(batch, width, kv_heads, -1)
    # [B * L, Hkv * G, D] -> rows [B, Hkv, L * G, D]
    rows = q.view(batch, -1, kv_heads, heads // kv_heads, dim).transpose(1, 2).flatten(2, 3)
    invalid = spread.isinf().any(-1).transpose(1, 2)  # [B, Hkv, N]
    spread = spread.masked_fill(spread.isinf(), 0.0).permute(0, 2, 3, 1)  # [B, Hkv, W, N]
    if reduce == "mean" and statistics.std_kind in ("l2", "rms"):
        # the mean of the products is the product with the mean: one row instead of L * G
        norm = rows.float().norm(dim=-1).mean(-1)[..., None, None]
        rows = rows.float().mean(2, keepdim=True)
    else:
        norm = rows.float().norm(dim=-1, keepdim=True)  # [B, Hkv, R, 1]
    logits = (rows.to(mean.dtype) @ mean.permute(0, 2, 3, 1)).float() * dim**-0.5  # [B, Hkv, R, N]
    if statistics.std_kind == "vector":
        logits += (lam * dim**-0.5) * (rows.float().abs() @ spread)
    elif statistics.std_kind == "diag2":
        parts = rows.float().square().tensor_split(GROUPS, -1)
        logits += (lam / dim) * (torch.stack([part.sum(-1) for part in parts], -1) @ spread)
    else:
        logits += (lam * dim**-0.5) * (norm @ spread)
    position = torch.arange(width)
    beyond = (position >= num_pages[:, None])[:, None]  # [B, 1, N]
    forced = ((position < sink_pages) | (position >= forced_from[:, None]))[:, None] | invalid
    if reduce == "max":
        score = logits.amax(2)
    elif reduce == "mean":
        score = logits.mean(2)
    else:
        bad = logits.isnan()
        out = (forced | beyond)[:, :, None] | bad
        score = logits.masked_fill(out, -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)
        score = score.masked_fill(bad.any(2), torch.nan)
    score = score.masked_fill(score.isnan(), LOWEST).clamp(LOWEST, FORCED / 10)
    return score.masked_fill_(forced, FORCED).masked_fill_(beyond, -torch.inf)
