"""The definition, in float64, one request and one key head at a time."""

from dataclasses import replace
from typing import Literal, get_args

import torch

Reduction = Literal["max", "mean", "softmax_sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
#: the score of a page that is always read, and the score that replaces NaN
FORCED, LOWEST = 1e30, -1e30


def page_scores(queries, statistics, page_table, num_pages, forced_from, sinks):
    """See dispatch.py; -> [B, Hkv, N * n] float64"""
    nodes = statistics.mean.shape[2]
    batch, width = len(page_table), page_table.shape[1] * nodes
    q, voters, lam = queries.q, queries.voters, queries.lam
    kv_heads, dim = statistics.mean.shape[1], q.shape[2]
    group = q.shape[1] // kv_heads
    out = torch.full((batch, kv_heads, width), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        count = int(num_pages[b])
        position = torch.arange(count)
        place, node = page_table[b, position // nodes].long(), position % nodes
        sink = sinks if isinstance(sinks, int) else int(sinks[b])
        own = torch.arange(int(queries.starts[b]), int(queries.ends[b]))
        if voters is not None and voters[own].any():
            own = own[voters[own]]
        for h in range(kv_heads):
            rows = q[own, h * group : (h + 1) * group].double().flatten(0, 1) * queries.sharpness  # [R, D]
            mean, spread = statistics.mean[place, h, node].double(), statistics.spread[place, h, node].double()
            forced = (position < sink) | (position >= int(forced_from[b])) | spread.isinf().any(-1)
            spread = spread.masked_fill(spread.isinf(), 0.0)
            logits = (rows @ mean.T) / dim**0.5  # [R, count]
            if statistics.std_kind == "vector":
                logits += lam * (rows.abs() @ spread.T) / dim**0.5
            elif statistics.std_kind == "diag2":
                energy = torch.stack([part.square().sum(-1) for part in rows.tensor_split(spread.shape[-1], -1)], -1)
                logits += lam * (energy @ spread.T) / dim
            elif statistics.std_kind != "none":
                logits += lam * rows.norm(dim=-1, keepdim=True) * spread.T / dim**0.5
            if queries.reduce == "max":
                score = logits.amax(0)
            elif queries.reduce == "mean":
                score = logits.mean(0)
            else:
                candidates = logits.masked_fill(forced | logits.isnan(), -torch.inf)
                score = candidates.softmax(-1).nan_to_num(0.0).sum(0)
                score = score.masked_fill(logits.isnan().any(0), torch.nan)
            score = score.masked_fill(score.isnan(), LOWEST).clamp(LOWEST, FORCED / 10)
            out[b, h, :count] = score.masked_fill(forced, FORCED)
    return out


def half_scores(queries, cache, block_table, runs, size, forced_from, sinks):
    """See dispatch.py; -> [B, Hkv, 2 * n] float64 and int32"""
    from vllm_dlm.kernels.haar_pyramid.statistics import PageStatistics

    (batch, kv_heads, width), (block_size, dim) = runs.shape, (cache.shape[2], queries.q.shape[2])
    group = queries.q.shape[1] // kv_heads
    scores = torch.full((batch, kv_heads, 2 * width), -torch.inf, dtype=torch.float64)
    halves = torch.full((batch, kv_heads, 2 * width), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(kv_heads):
            own = runs[b, h][runs[b, h] >= 0].long()
            half = (2 * own[:, None] + torch.arange(2)).flatten()
            position = half[:, None] * size + torch.arange(size)  # [m, size]
            keys = cache[block_table[b, position // block_size].long(), h, position % block_size, :dim].double()
            mean, spread = keys.mean(1)[:, None, None], keys.std(1, correction=0)[:, None, None]
            statistics = PageStatistics(mean, spread, size, "vector" if queries.lam else "none")
            q = queries.q[:, h * group : (h + 1) * group]
            part = replace(queries, q=q, starts=queries.starts[b : b + 1], ends=queries.ends[b : b + 1])
            table, count = torch.arange(len(half))[None], torch.tensor([len(half)])
            halves[b, h, : len(half)] = half
            marks = forced_from[b : b + 1], sinks[b : b + 1]
            scores[b, h, : len(half)] = page_scores(part, statistics, table, count, *marks)[0, 0]
    return scores, halves
