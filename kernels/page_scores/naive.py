"""The definition, in float64, one request and one key head at a time."""

from typing import Literal, get_args

import torch

Reduction = Literal["max", "mean", "softmax_sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
#: the score of a page that is always read, and the score that replaces NaN
FORCED, LOWEST = 1e30, -1e30


def page_scores(
    q,
    q_starts,
    statistics,
    page_table,
    num_pages,
    forced_from,
    sink_pages,
    lam,
    reduce,
    q_ends=None,
    voters=None,
    sharpness=1.0,
):
    """See dispatch.py; -> [B, Hkv, N * n] float64"""
    nodes = statistics.mean.shape[2]
    batch, width = len(page_table), page_table.shape[1] * nodes
    kv_heads, dim = statistics.mean.shape[1], q.shape[2]
    group = q.shape[1] // kv_heads
    ends = q_starts[1:] if q_ends is None else q_ends
    out = torch.full((batch, kv_heads, width), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        count = int(num_pages[b])
        position = torch.arange(count)
        place, node = page_table[b, position // nodes].long(), position % nodes
        sinks = sink_pages if isinstance(sink_pages, int) else int(sink_pages[b])
        own = torch.arange(int(q_starts[b]), int(ends[b]))
        if voters is not None and voters[own].any():
            own = own[voters[own]]
        for h in range(kv_heads):
            queries = q[own, h * group : (h + 1) * group].double().flatten(0, 1) * sharpness  # [R, D]
            mean, spread = statistics.mean[place, h, node].double(), statistics.spread[place, h, node].double()
            forced = (position < sinks) | (position >= int(forced_from[b])) | spread.isinf().any(-1)
            spread = spread.masked_fill(spread.isinf(), 0.0)
            logits = (queries @ mean.T) / dim**0.5  # [R, count]
            if statistics.std_kind == "vector":
                logits += lam * (queries.abs() @ spread.T) / dim**0.5
            elif statistics.std_kind == "diag2":
                energy = torch.stack([part.square().sum(-1) for part in queries.tensor_split(spread.shape[-1], -1)], -1)
                logits += lam * (energy @ spread.T) / dim
            elif statistics.std_kind != "none":
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


def half_scores(
    q, q_starts, q_ends, cache, block_table, runs, size, forced_from, sinks, lam, reduce, voters=None, sharpness=1.0
):
    """See dispatch.py; -> [B, Hkv, 2 * n] float64 and int32"""
    from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics

    (batch, kv_heads, width), (block_size, dim) = runs.shape, (cache.shape[2], q.shape[2])
    group = q.shape[1] // kv_heads
    scores = torch.full((batch, kv_heads, 2 * width), -torch.inf, dtype=torch.float64)
    halves = torch.full((batch, kv_heads, 2 * width), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(kv_heads):
            own = runs[b, h][runs[b, h] >= 0].long()
            half = (2 * own[:, None] + torch.arange(2)).flatten()
            position = half[:, None] * size + torch.arange(size)  # [m, size]
            keys = cache[block_table[b, position // block_size].long(), h, position % block_size, :dim].double()
            mean, spread = keys.mean(1)[:, None, None], keys.std(1, correction=0)[:, None, None]
            statistics = PageStatistics(mean, spread, size, "vector" if lam else "none")
            halves[b, h, : len(half)] = half
            scores[b, h, : len(half)] = page_scores(
                q[:, h * group : (h + 1) * group],
                q_starts[b : b + 1],
                statistics,
                torch.arange(len(half))[None],
                torch.tensor([len(half)]),
                forced_from[b : b + 1],
                sinks[b : b + 1],
                lam,
                reduce,
                q_ends[b : b + 1],
                voters,
                sharpness,
            )[0, 0]
    return scores, halves
