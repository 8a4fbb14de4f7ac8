"""Queries are processed in pieces of bounded size and recomputed in the backward pass, so memory is linear in the
sequence length, not quadratic.

Only the inputs, the statistics and the output are kept between the passes.
"""

import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from vllm_dlm.kernels.haar_pyramid.statistics import GROUPS
from vllm_dlm.kernels.soft_page_attention.gate import ROWS, Gate, Rows, choices, parts, threshold

#: maximum number of logits held at once, over all sequences and heads
LOGITS = 1 << 22
#: keeps the gradient of the square root finite if all keys of a page are equal
TINY = 1e-12


def soft_page_attention(q, k, v, gate: Gate, scale, prompt_len=0):
    """See dispatch.py"""
    heads = q.shape[0] * q.shape[1]
    return in_pieces(Piece, rows_at_once(heads, k.shape[2]), q, k, v, gate, scale, prompt_len)


def in_pieces(piece, limit, q, k, v, gate, scale, prompt_len):
    """Attention piece by piece. `piece`: autograd Function for queries that choose. `limit`: queries per piece."""
    count, keys, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    first = keys - count
    grouped = q.unflatten(1, (kv_heads, q.shape[1] // kv_heads))  # [B, Hkv, G, T, D]
    mean = spread = None
    out = []
    for rows in parts(gate, first, keys, prompt_len, limit):
        own = grouped[..., rows.start - first : rows.stop - first, :]
        if rows.dense:
            out.append(dense(own, k, v, gate, scale, rows).to(q.dtype))
            continue
        if mean is None:
            mean, spread = page_statistics(k, gate)
        out.append(piece.apply(own, k, v, mean, spread, gate, scale, rows, prompt_len, limit).to(q.dtype))
    return torch.cat(out, 3).flatten(1, 2)


def rows_at_once(heads: int, keys: int) -> int:
    return max(1, min(ROWS, LOGITS // (heads * keys)))


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def page_statistics(k: torch.Tensor, gate: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """k [B, Hkv, N, D] -> mean [B, Hkv, pages, D] and spread [B, Hkv, pages, W] of whole pages, differentiable"""
    size = gate.page_size
    runs = wide(k[:, :, : k.shape[2] // size * size]).unflatten(2, (-1, size))
    mean = runs.mean(3)
    variance = (runs - mean[:, :, :, None]).square().mean(3)
    if gate.std_kind == "vector":
        return mean, variance.clamp_min(TINY).sqrt()
    if gate.std_kind == "diag2":
        return mean, torch.stack([part.mean(-1) for part in variance.tensor_split(GROUPS, -1)], -1)
    total = variance.sum(-1, keepdim=True)
    return mean, (total if gate.std_kind == "l2" else total / k.shape[3]).clamp_min(TINY).sqrt()


def dense(q, k, v, gate, scale, rows):
    """Attention of queries that read everything they see: q [B, Hkv, G, R, D] -> [B, Hkv, G, R, D]"""
    group, causal = q.shape[2], gate.causal
    if causal and rows.start and len(rows) > ROWS:  # an explicit mask is needed, so bound its size
        pieces = [Rows(at, min(at + ROWS, rows.stop), dense=True) for at in range(rows.start, rows.stop, ROWS)]
        return torch.cat([dense(p, k, v, gate, scale, r) for p, r in zip(q.split(ROWS, 3), pieces, strict=True)], 3)
    mask = None
    if causal:
        k, v = k[:, :, : rows.stop], v[:, :, : rows.stop]
        if rows.start:  # is_causal aligns the first query with the first key
            position = torch.arange(rows.start, rows.stop, device=q.device)
            mask, causal = torch.arange(rows.stop, device=q.device) <= position[:, None], False
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = scaled_dot_product_attention(q.flatten(1, 2), k, v, mask, is_causal=causal, scale=scale)
    return out.unflatten(1, (-1, group))


class Piece(torch.autograd.Function):
    """Some rows of the attention matrix, which are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, mean, spread, gate, scale, rows, prompt_len, limit):
        ctx.save_for_backward(q, k, v, mean, spread)
        ctx.rest = gate, scale, rows, prompt_len, limit
        return attend(q, k, v, mean, spread, *ctx.rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = attend(*inputs, *ctx.rest)
        grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        return *grads, None, None, None, None, None


def attend(q, k, v, mean, spread, gate, scale, rows, prompt_len, limit):
    """q [B, Hkv, G, R, D] for queries `rows`, keys and values of the whole sequence -> [B, Hkv, G, R, D]"""
    log_mask = page_log_mask(q, mean, spread, gate, scale, rows, k.shape[2], prompt_len, limit)
    if gate.causal:
        k, v = k[:, :, : rows.stop], v[:, :, : rows.stop]
    out, pieces, start = [], split(q, limit), rows.start
    for piece in pieces:
        at = start if gate.causal else None
        out.append(again(weigh, len(pieces), piece, k, v, log_mask, gate.page_size, scale, at))
        start += piece.shape[3]
    return torch.cat(out, 3)


def page_log_mask(q, mean, spread, gate, scale, rows, keys, prompt_len, limit):
    """-> log m [B, Hkv, R, pages], or [B, Hkv, 1, pages] for queries that choose together"""
    choosable, keep = choices(gate, rows, keys, prompt_len, q.device)
    pieces = split(q, limit)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not gate.hard):
        scored = [
            again(page_scores, len(pieces), p, mean, spread, choosable, gate, scale, rows.together) for p in pieces
        ]
        scores = combine(scored, [p.shape[3] for p in pieces], gate) if rows.together else scored[0]
        return log_of_mask(scores, choosable, keep, gate)


def split(q, limit):
    return [q] if q.shape[3] <= limit else q.split(limit, 3)


def again(function, pieces, *inputs):
    """Checkpoints `function`. A single piece needs no checkpoint, because the caller already recomputes it."""
    if pieces == 1 or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def page_scores(q, mean, spread, choosable, gate, scale, together):
    """-> [B, Hkv, R or 1, pages], reduced over the heads that share a key head and over queries that choose together"""
    q = wide(q)
    mean, spread = mean[:, :, None].transpose(-1, -2), spread[:, :, None].transpose(-1, -2)  # [B, Hkv, 1, D, pages]
    scores = (q @ mean) * scale  # [B, Hkv, G, R, pages]
    if gate.std_kind == "vector":
        scores = scores + gate.lam * scale * (q.abs() @ spread)
    elif gate.std_kind == "diag2":
        energy = torch.stack([part.square().sum(-1) for part in q.tensor_split(GROUPS, -1)], -1)
        scores = scores + gate.lam * scale**2 * (energy @ spread)
    else:
        scores = scores + gate.lam * scale * q.norm(dim=-1, keepdim=True) * spread
    over = (2, 3) if together else (2,)
    if gate.reduce == "max":
        scores = scores.amax(over)
    elif gate.reduce == "mean":
        scores = scores.mean(over)
    else:
        # The softmax of a row without choosable pages is undefined. Its scores are not used.
        lonely = ~choosable.any(-1, keepdim=True)
        scores = scores.masked_fill(~(choosable | lonely), -torch.inf).softmax(-1).sum(over)
    return scores[:, :, None] if together else scores


def combine(scored, counts, gate):
    if len(scored) == 1:
        return scored[0]
    scored = torch.stack(scored)
    if gate.reduce == "max":
        return scored.amax(0)
    if gate.reduce == "softmax_sum":
        return scored.sum(0)
    weights = torch.tensor(counts, device=scored.device, dtype=scored.dtype) / sum(counts)
    return (scored * weights.view(-1, 1, 1, 1, 1)).sum(0)


def log_of_mask(scores, choosable, keep, gate):
    tau = threshold(scores.detach() if gate.stop_threshold else scores, choosable, keep)[..., None]
    if gate.hard:
        return torch.where(choosable & (scores < tau), -torch.inf, torch.zeros_like(scores))
    return logsigmoid((scores - tau) / gate.temperature).masked_fill(~choosable, 0.0)


def weigh(q, k, v, log_mask, size, scale, start):
    """Attention with the mask's bias. `start`: position of the first query if causal, else None"""
    logits = logits_of(q, k, scale, start) + by_key(log_mask, k.shape[2], size)
    return logits.softmax(-1) @ wide(v)[:, :, None]


def logits_of(q, k, scale, start):
    """-> [B, Hkv, G, R, N]"""
    logits = (wide(q) * scale) @ wide(k)[:, :, None].transpose(-1, -2)
    if start is not None:
        position = torch.arange(start, start + q.shape[3], device=q.device)
        later = torch.arange(k.shape[2], device=q.device) > position[:, None]
        logits = logits.masked_fill(later, -torch.inf)
    return logits


def by_key(of_page, keys, size):
    """[B, Hkv, R, pages] -> [B, Hkv, 1, R, N]; an unfinished page is open"""
    of_key = of_page[..., : -(-keys // size)].repeat_interleave(size, -1)[..., :keys]
    return torch.nn.functional.pad(of_key, (0, keys - of_key.shape[-1]))[:, :, None]
