"""One matrix product of all queries of a request with its pages' means, and one with their spreads.

Requests with one query each are scored together, others one by one. Rows are
the queries of the heads that share a key head.
"""

import torch

from vllm_dlm.kernels.haar_pyramid.statistics import GROUPS
from vllm_dlm.kernels.haar_pyramid.torch import pyramid
from vllm_dlm.kernels.packed_attention import read_key_runs
from vllm_dlm.kernels.page_scores.naive import FORCED, LOWEST


def page_scores(queries, statistics, page_table, num_pages, forced_from, sinks):
    """See dispatch.py"""
    batch, nodes = len(page_table), statistics.mean.shape[2]
    width, q, voters = page_table.shape[1] * nodes, queries.q, queries.voters
    starts, ends = queries.starts.tolist(), queries.ends.tolist()
    if batch > 1 and voters is None and len(q) == batch == ends[-1] and {1} == {*map(int.__sub__, ends, starts)}:
        position = torch.arange(width)
        sink = sinks[:, None] if isinstance(sinks, torch.Tensor) else sinks
        forced = (position < sink) | (position >= forced_from[:, None])
        beyond = (position >= num_pages[:, None])[:, None]  # [B, 1, N * n]
        score = _scored(q[:, None], statistics, page_table, width, forced[:, None], beyond, queries)
        return score.masked_fill_(beyond, -torch.inf)
    sinks = sinks.tolist() if isinstance(sinks, torch.Tensor) else [sinks] * batch
    marks = zip(starts, ends, num_pages.tolist(), sinks, forced_from.tolist(), strict=False)
    out = None
    for b, (start, end, count, sink, last) in enumerate(marks):
        forced = torch.zeros(1, 1, count, dtype=torch.bool)
        forced[..., :sink] = True
        forced[..., max(last, 0) :] = True
        own, table = electing(q[start:end], voters, start)[None], page_table[b : b + 1, : -(-count // nodes)]
        score = _scored(own, statistics, table, count, forced, None, queries)
        if batch == 1 and count == width:
            return score
        if out is None:
            out = torch.full((batch, score.shape[1], width), -torch.inf)
        out[b, :, :count] = score[0]
    return out


def electing(q, voters, start):
    """The queries that vote, or all if none does. `start`: index of the first query of q in `voters`"""
    if voters is None:
        return q
    own = voters[start : start + len(q)]
    return q[own] if bool(own.any()) and not bool(own.all()) else q


def _scored(q, statistics, page_table, count, forced, beyond, queries):
    """q [B, L, H, D] -> [B, Hkv, count]"""
    kv_heads, kind = statistics.mean.shape[1], statistics.std_kind
    mean = by_head(statistics.mean, page_table)[:, :, :count]
    spread = None if kind == "none" else by_head(statistics.spread, page_table)[:, :, :count].transpose(2, 3)
    rows = by_key_head(q, kv_heads, queries.sharpness)
    return score_rows(rows, mean.transpose(2, 3), spread, kind, forced, beyond, queries.lam, queries.reduce)


def by_head(vectors, table):
    """vectors [places, Hkv, n, W], table [B, N] -> [B, Hkv, N * n, W]. Gathers head by head, because products with
    non-contiguous vectors are many times slower."""
    kv_heads = vectors.shape[1]
    if len(vectors) == 1 == table.numel():
        return vectors
    row = table[:, None] * kv_heads + torch.arange(kv_heads)[:, None]  # [B, Hkv, N]
    found = vectors.flatten(0, 1).index_select(0, row.flatten())
    return found.view(len(table), kv_heads, -1, vectors.shape[3])


def by_key_head(q, kv_heads, sharpness):
    """[B, L, Hkv * G, D] -> rows [B, Hkv, L * G, D]"""
    q = q if sharpness == 1 else q * sharpness
    return q.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)


def half_scores(queries, cache, block_table, runs, size, forced_from, sinks):
    """See dispatch.py"""
    kv_heads, lam, voters = runs.shape[1], queries.lam, queries.voters
    halves = (2 * runs[..., None] + torch.arange(2, dtype=runs.dtype)).flatten(2)
    halves.masked_fill_((runs < 0).repeat_interleave(2, -1), -1)
    scores, marks = torch.full(halves.shape, -torch.inf), (sinks.tolist(), forced_from.tolist())
    for b, (start, end) in enumerate(zip(queries.starts.tolist(), queries.ends.tolist(), strict=True)):
        count = int((runs[b, 0] >= 0).sum())
        if not count:
            continue
        mean, spread = describe(keys_of(cache, block_table[b], runs[b, :, :count], 2 * size), size, lam > 0)
        rows = by_key_head(electing(queries.q[start:end], voters, start)[None], kv_heads, queries.sharpness)
        forced = torch.zeros(1, 1, 2 * count, dtype=torch.bool)
        forced[..., : marks[0][b]] = True
        forced[..., max(marks[1][b], 0) :] = True
        spread = None if spread is None else spread.transpose(1, 2)[None]
        kind = "none" if spread is None else "vector"
        own = score_rows(rows, mean.transpose(1, 2)[None], spread, kind, forced, None, lam, queries.reduce)
        scores[b, :, : 2 * count] = own[0]
    return scores, halves


def keys_of(cache, table, runs, size):
    """Runs [Hkv, n] of `size` consecutive keys -> their keys [Hkv, n, size, D]"""
    _, kv_heads, block_size, _ = cache.shape
    per_block = block_size // size
    block = table.index_select(0, (runs // per_block).flatten()).view(runs.shape)
    row = (block * kv_heads + torch.arange(kv_heads)[:, None]) * per_block + runs % per_block
    return read_key_runs(cache, row.flatten(), size).unflatten(0, runs.shape)


def describe(keys, size, spread):
    """[Hkv, n, 2 * size, D] -> mean and standard deviation (None unless wanted) of the halves, [Hkv, 2 * n, D]"""
    keys = keys.unflatten(2, (2, size)).flatten(1, 2)
    if size == 1:
        return keys[:, :, 0], torch.zeros_like(keys[:, :, 0]) if spread else None
    if size == 2:  # for two numbers, mean and deviation are half the sum and half the difference
        even, odd = keys[:, :, 0], keys[:, :, 1]
        return (even + odd).mul_(0.5), (even - odd).mul_(0.5).abs_() if spread else None
    ((mean, variance),) = pyramid(keys, (size.bit_length() - 1,))
    return mean[:, :, 0].to(keys.dtype), variance[:, :, 0].sqrt_().to(keys.dtype) if spread else None


def score_rows(rows, mean, spread, std_kind, forced, beyond, lam, reduce):
    """rows [B, Hkv, R, D], mean [B, Hkv, D, N], spread [B, Hkv, W, N], forced and beyond (None: none) [B, 1, N]
    -> [B, Hkv, N]"""
    dim = rows.shape[3]
    if std_kind != "none":
        invalid = spread[:, :, 0].isinf()  # [B, Hkv, N]; an invalid page is infinite in all of its entries
        if invalid.any():
            spread = spread.masked_fill(spread.isinf(), 0.0)
        forced = forced | invalid
    if reduce == "mean" and std_kind in ("l2", "rms"):
        # the mean of the products equals the product with the mean, so one row replaces L * G
        norm = rows.float().norm(dim=-1).mean(-1)[..., None, None]
        rows = rows.float().mean(2, keepdim=True)
    elif std_kind in ("l2", "rms"):
        norm = rows.float().norm(dim=-1, keepdim=True)  # [B, Hkv, R, 1]
    logits = (rows.to(mean.dtype) @ mean).float().mul_(dim**-0.5)  # [B, Hkv, R, N]
    if not lam or std_kind == "none":
        pass
    elif std_kind == "vector":
        logits += (lam * dim**-0.5 * rows.abs()).to(spread.dtype) @ spread
    elif std_kind == "diag2":
        parts = rows.float().square().tensor_split(GROUPS, -1)
        logits += (lam / dim) * (torch.stack([part.sum(-1) for part in parts], -1) @ spread.float())
    else:
        logits += (lam * dim**-0.5) * (norm @ spread.float())
    if reduce == "max":
        score = logits.amax(2)
    elif reduce == "mean":
        score = logits.mean(2)
    else:
        score = votes(logits, forced if beyond is None else forced | beyond)
    score = score.masked_fill(score.isnan(), LOWEST).clamp_(LOWEST, FORCED / 10)
    return score.masked_fill_(forced, FORCED)


def votes(logits, left_out):
    """Softmax over the pages that are not left out, summed over the rows: [B, Hkv, R, N] -> [B, Hkv, N]"""
    bad = None
    if not torch.isfinite(logits.sum()):  # a single-pass check for NaN, which is rare
        bad = logits.isnan()
        logits = logits.masked_fill(bad, -torch.inf)
    if bool(left_out.any()):
        logits = logits.masked_fill_(left_out[:, :, None], -torch.inf)
    score = logits.softmax(-1).sum(2)
    if bad is not None:
        score = score.masked_fill(bad.any(2), torch.nan)
    # if all pages are left out, the softmax is NaN
    return score.masked_fill(left_out, 0.0)
