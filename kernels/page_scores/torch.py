"""One product of all queries of a request with its pages' means, and one with their spreads.

Requests of equally many queries are scored together. Rows are the queries of
the heads that share a key head.
"""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import GROUPS
from vllm_dlm.kernels.page_scores.naive import FORCED, LOWEST


def page_scores(q, q_starts, statistics, page_table, num_pages, forced_from, sink_pages, lam, reduce):
    """See dispatch.py"""
    batch, width = page_table.shape
    kv_heads, heads, dim = statistics.mean.shape[1], q.shape[1], q.shape[2]
    counts = q_starts.diff().tolist()
    if len(set(counts)) > 1:
        parts = [
            page_scores(
                q[start : start + n],
                torch.tensor([0, n]),
                statistics,
                page_table[b : b + 1],
                num_pages[b : b + 1],
                forced_from[b : b + 1],
                sink_pages,
                lam,
                reduce,
            )
            for b, (start, n) in enumerate(zip(q_starts.tolist(), counts, strict=False))
        ]
        return torch.cat(parts)
    # gathered head by head: products with keys that do not lie side by side are many times slower
    head = torch.arange(kv_heads)[:, None]
    row = (page_table[:, None] * kv_heads + head).flatten()  # [B, Hkv, N]
    mean = statistics.mean.view(-1, dim).index_select(0, row).view(batch, kv_heads, width, dim)
    spread = statistics.spread.flatten(0, 2).index_select(0, row).view(batch, kv_heads, width, -1)
    # [B * L, Hkv * G, D] -> rows [B, Hkv, L * G, D]
    rows = q.view(batch, -1, kv_heads, heads // kv_heads, dim).transpose(1, 2).flatten(2, 3)
    position = torch.arange(width)
    beyond = (position >= num_pages[:, None])[:, None]  # [B, 1, N]
    forced = ((position < sink_pages) | (position >= forced_from[:, None]))[:, None]
    score = score_rows(
        rows, mean.transpose(2, 3), spread.transpose(2, 3), statistics.std_kind, forced, beyond, lam, reduce
    )
    return score.masked_fill_(beyond, -torch.inf)


def run_scores(q, mean, spread, std_kind, forced_from, sink_pages, lam, reduce):
    """See dispatch.py"""
    kv_heads, count, _dim = mean.shape
    rows = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)  # [Hkv, L * G, D]
    position = torch.arange(count)
    forced = ((position < sink_pages) | (position >= forced_from)).view(1, 1, count)
    beyond = torch.zeros_like(forced)
    return score_rows(
        rows[None], mean.transpose(1, 2)[None], spread.transpose(1, 2)[None], std_kind, forced, beyond, lam, reduce
    )


def score_rows(rows, mean, spread, std_kind, forced, beyond, lam, reduce):
    """rows [B, Hkv, R, D], mean [B, Hkv, D, N], spread [B, Hkv, W, N], forced and beyond [B, 1, N] -> [B, Hkv, N]"""
    dim = rows.shape[3]
    invalid = spread[:, :, 0].isinf()  # [B, Hkv, N]; a page is invalid as a whole
    if invalid.any():
        spread = spread.masked_fill(spread.isinf(), 0.0)
    if reduce == "mean" and std_kind in ("l2", "rms"):
        # the mean of the products is the product with the mean: one row instead of L * G
        norm = rows.float().norm(dim=-1).mean(-1)[..., None, None]
        rows = rows.float().mean(2, keepdim=True)
    else:
        norm = rows.float().norm(dim=-1, keepdim=True)  # [B, Hkv, R, 1]
    logits = (rows.to(mean.dtype) @ mean).float().mul_(dim**-0.5)  # [B, Hkv, R, N]
    if not lam:
        pass
    elif std_kind == "vector":
        logits += (lam * dim**-0.5 * rows.abs()).to(spread.dtype) @ spread
    elif std_kind == "diag2":
        parts = rows.float().square().tensor_split(GROUPS, -1)
        logits += (lam / dim) * (torch.stack([part.sum(-1) for part in parts], -1) @ spread.float())
    else:
        logits += (lam * dim**-0.5) * (norm @ spread.float())
    forced = forced | invalid
    if reduce == "max":
        score = logits.amax(2)
    elif reduce == "mean":
        score = logits.mean(2)
    else:
        score = votes(logits, forced | beyond)
    score = score.masked_fill(score.isnan(), LOWEST).clamp_(LOWEST, FORCED / 10)
    return score.masked_fill_(forced, FORCED)


def votes(logits, left_out):
    """Softmaxes over the pages that stand for election, summed over the rows: [B, Hkv, R, N] -> [B, Hkv, N]"""
    bad = None
    if not torch.isfinite(logits.sum()):  # one pass, and rarely true
        bad = logits.isnan()
        logits = logits.masked_fill(bad, -torch.inf)
    if bool(left_out.any()):
        logits = logits.masked_fill_(left_out[:, :, None], -torch.inf)
    score = logits.softmax(-1).sum(2)
    if bad is not None:
        score = score.masked_fill(bad.any(2), torch.nan)
    # where nobody stands there is nothing to share out
    return score.masked_fill(left_out, 0.0)
