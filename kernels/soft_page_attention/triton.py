"""GPU kernels: a fused attention with a bias per query and page, and its two backward kernels.

Scores and mask of a piece of the queries are computed in torch under autograd.
The kernels take the mask, [queries, pages] for each key head, and return its
gradient. Rows are queries times the G heads that share a key head: row r is
head r % G of query r // G. A tile of keys lies within one page, so its bias is
one number per row. Pages that are closed for all rows of a tile are skipped.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.soft_page_attention import torch as plain
from vllm_dlm.kernels.soft_page_attention.gate import Gate
from vllm_dlm.kernels.triton_utils import dot, padded

LOG2E = tl.constexpr(1.4426950408889634)
#: maximum number of scores of a piece held at once, over all sequences and heads
SCORES = 1 << 26


def soft_page_attention(q, k, v, gate: Gate, scale, prompt_len=0):
    """See dispatch.py"""
    widest = max((TILES if q.element_size() < 4 else TILES_FLOAT32)["forward"])
    if gate.page_size < 16 or q.shape[3] != v.shape[3] or q.shape[3] > widest or q.dtype == torch.float64:
        return plain.soft_page_attention(q, k, v, gate, scale, prompt_len)
    pages = max(1, k.shape[2] // gate.page_size)
    limit = max(128, SCORES // (q.shape[0] * q.shape[1] * pages))
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    return plain.in_pieces(Piece, limit, q, k, v, gate, scale, prompt_len)


class Piece(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mean, spread, gate, scale, rows, prompt_len, limit):
        log_mask = plain.page_log_mask(q, mean, spread, gate, scale, rows, k.shape[2], prompt_len, limit)
        out, lse = forward(q, k, v, log_mask, gate, scale, rows)
        ctx.save_for_backward(q, k, v, mean, spread, out, lse)
        ctx.rest = gate, scale, rows, prompt_len, limit
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, mean, spread, out, lse = ctx.saved_tensors
        gate, scale, rows, prompt_len, limit = ctx.rest
        asked = [x.detach().requires_grad_() for x in (q, mean, spread)]
        with torch.enable_grad():
            q_, mean_, spread_ = asked
            log_mask = plain.page_log_mask(q_, mean_, spread_, gate, scale, rows, k.shape[2], prompt_len, limit)
        dq, dk, dv, dmask = backward(q, k, v, log_mask.detach(), out, lse, grad, gate, scale, rows)
        if gate.hard:
            return dq, dk, dv, None, None, None, None, None, None, None
        through, dmean, dspread = torch.autograd.grad(log_mask, asked, dmask)
        return dq + through, dk, dv, dmean, dspread, None, None, None, None, None


def as_rows(x):
    """[B, Hkv, G, R, D] -> [B, Hkv, R * G, D], contiguous"""
    return x.transpose(2, 3).flatten(2, 3).contiguous()


def from_rows(x, group):
    return x.unflatten(2, (-1, group)).transpose(2, 3)


#: kernel -> maximum head dimension -> (rows per tile, keys per tile, warps), for 16-bit dtypes
TILES = {
    "forward": {64: (64, 64, 4), 128: (64, 32, 8), 256: (32, 32, 4)},
    "queries": {64: (64, 32, 8), 128: (64, 32, 8), 256: (16, 32, 4)},
    "keys": {64: (32, 32, 8), 128: (32, 32, 8), 256: (16, 32, 8)},
}
#: the same for float32, whose exact products take many registers; wider heads fall back to torch
TILES_FLOAT32 = {"forward": {64: (16, 16, 8)}, "queries": {64: (16, 16, 8)}, "keys": {64: (16, 16, 8)}}


def layout(kernel, q, gate, rows, group):
    """Compile-time arguments for q [B, Hkv, R * G, D]"""
    count, dim = q.shape[2:]
    tiles = (TILES if q.element_size() < 4 else TILES_FLOAT32)[kernel]
    block_r, block_n, warps = tiles[min(width for width in tiles if width >= dim)]
    return {
        "GROUP": group,
        "DIM": dim,
        "DIM_PAD": padded(dim, 16),
        "PAGE": gate.page_size,
        "CAUSAL": gate.causal,
        "TOGETHER": rows.together,
        "BLOCK_R": min(block_r, padded(count, 16)),
        "BLOCK_N": min(block_n, gate.page_size),
        "num_warps": warps,
        "num_stages": 2 if kernel == "forward" and dim <= 128 else 1,
    }


def forward(q, k, v, log_mask, gate, scale, rows):
    """q [B, Hkv, G, R, D] -> [B, Hkv, G, R, D], lse [B, Hkv, R * G]"""
    group = q.shape[2]
    q, log_mask = as_rows(q), log_mask.contiguous()
    batch, kv_heads, count, _ = q.shape
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
    chosen = layout("forward", q, gate, rows, group)
    sizes = (*k.stride()[:3], *v.stride()[:3], kv_heads, count, k.shape[2], log_mask.shape[3], rows.start, scale)
    grid = triton.cdiv(count, chosen["BLOCK_R"]), batch * kv_heads
    _forward[grid](q, k, v, log_mask, out, lse, *sizes, **chosen)
    return from_rows(out, group), lse


def backward(q, k, v, log_mask, out, lse, grad, gate, scale, rows):
    """-> gradients of q, k, v and log_mask, each with the shape of its input"""
    group = q.shape[2]
    q, grad, log_mask = as_rows(q), as_rows(grad.to(q.dtype)), log_mask.contiguous()
    batch, kv_heads, count, dim = q.shape
    keys, pages = k.shape[2], log_mask.shape[3]
    delta = (grad.float() * as_rows(out).float()).sum(-1)  # [B, Hkv, R * G]
    dq = torch.empty_like(q)
    dk, dv = (torch.empty(batch, kv_heads, keys, dim, device=k.device, dtype=k.dtype) for _ in range(2))
    dmask = None if gate.hard else torch.zeros(batch, kv_heads, count, pages, device=q.device, dtype=torch.float32)
    given = (q, k, v, log_mask, grad, lse, delta)
    sizes = (*k.stride()[:3], *v.stride()[:3], kv_heads, count, keys, pages, rows.start, scale)
    chosen = layout("queries", q, gate, rows, group)
    _backward_queries[triton.cdiv(count, chosen["BLOCK_R"]), batch * kv_heads](*given, dq, dmask, *sizes, **chosen)
    chosen = layout("keys", q, gate, rows, group)
    _backward_keys[triton.cdiv(keys, chosen["BLOCK_N"]), batch * kv_heads](*given, dk, dv, *sizes, **chosen)
    if dmask is not None:
        dmask = dmask.unflatten(2, (-1, group)).sum(3)
        dmask = dmask.sum(2, keepdim=True) if rows.together else dmask  # [B, Hkv, R or 1, pages]
    return from_rows(dq, group), dk, dv, dmask


@triton.jit
def _rows(x, start, row, there, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows start + row of x [.., DIM]: [R, DIM_PAD], zero for rows that are not there"""
    channel = tl.arange(0, DIM_PAD)
    place = (start + row).to(tl.int64) * DIM
    return tl.load(x + place[:, None] + channel[None, :], mask=there[:, None] & (channel < DIM)[None, :], other=0.0)


@triton.jit
def _keys(x, base, key, stride, keys, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """[N, DIM_PAD]"""
    channel = tl.arange(0, DIM_PAD)
    mask = (key < keys)[:, None] & (channel < DIM)[None, :]
    return tl.load(x + base + key.to(tl.int64)[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _bias(log_mask, bh, row, there, page, count, pages, GROUP: tl.constexpr, TOGETHER: tl.constexpr):
    """log2 m of each row for one page: -inf for rows that do not exist, 0 for an unfinished page, which has no mask"""
    place = bh.to(tl.int64) + row * 0 if TOGETHER else bh.to(tl.int64) * (count // GROUP) + row // GROUP
    bias = tl.load(log_mask + place * pages + page, mask=there & (row * 0 + page < pages), other=0.0)
    return tl.where(there, bias * LOG2E, float("-inf"))


@triton.jit
def _logits(q, k, bias, key, position, keys, scale, CAUSAL: tl.constexpr):
    """Logits [R, N] in base 2; -inf where a row does not see a key"""
    logits = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * (scale * LOG2E) + bias[:, None]
    seen = (key < keys)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= position[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _place(kv_heads, kb, kh, vb, vh):
    bh = tl.program_id(1)
    b, h = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    return bh, b * kb + h * kh, b * vb + h * vh


@triton.jit
def _seen_pages(position, there, keys, PAGE: tl.constexpr, CAUSAL: tl.constexpr):
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, tl.max(tl.where(there, position, 0), 0) + 1)
    return tl.cdiv(end, PAGE)


@triton.jit
def _forward(
    q, k, v, log_mask, out, lse, kb, kh, kn, vb, vh, vn, kv_heads, count, keys, pages, first, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """q, out [B, Hkv, count, DIM], lse [B, Hkv, count] in base e; `first`: position of query 0"""
    bh, k_base, v_base = _place(kv_heads, kb, kh, vb, vh)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there, position = row < count, first + row // GROUP
    start = bh.to(tl.int64) * count
    q_tile = _rows(q, start, row, there, DIM, DIM_PAD)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, DIM_PAD), tl.float32)
    for page in range(_seen_pages(position, there, keys, PAGE, CAUSAL)):
        bias = _bias(log_mask, bh, row, there, page, count, pages, GROUP, TOGETHER)
        if tl.max(bias, 0) > float("-inf"):
            for part in range(PAGE // BLOCK_N):
                key = page * PAGE + part * BLOCK_N + tl.arange(0, BLOCK_N)
                logits = _logits(
                    q_tile, _keys(k, k_base, key, kn, keys, DIM, DIM_PAD), bias, key, position, keys, scale, CAUSAL
                )
                higher = tl.maximum(top, tl.max(logits, 1))
                safe = tl.where(higher == float("-inf"), 0.0, higher)
                weight = tl.exp2(logits - safe[:, None])
                fade = tl.exp2(top - safe)
                total = total * fade + tl.sum(weight, 1)
                v_tile = _keys(v, v_base, key, vn, keys, DIM, DIM_PAD)
                acc = dot(weight.to(v_tile.dtype), v_tile, acc * fade[:, None])
                top = higher
    channel = tl.arange(0, DIM_PAD)
    place = (start + row)[:, None] * DIM + channel[None, :]
    mask = there[:, None] & (channel < DIM)[None, :]
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + start + row, (top + tl.log2(total)) / LOG2E, mask=there)


@triton.jit
def _backward_queries(
    q, k, v, log_mask, grad, lse, delta, dq, dmask, kb, kh, kn, vb, vh, vn, kv_heads, count, keys, pages, first, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores dq and dmask [B, Hkv, count, pages], one entry per row. dmask must be zeroed; None: not computed"""
    bh, k_base, v_base = _place(kv_heads, kb, kh, vb, vh)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    there, position = row < count, first + row // GROUP
    start = bh.to(tl.int64) * count
    q_tile, g_tile = _rows(q, start, row, there, DIM, DIM_PAD), _rows(grad, start, row, there, DIM, DIM_PAD)
    norm = tl.load(lse + start + row, mask=there, other=0.0) * LOG2E
    own = tl.load(delta + start + row, mask=there, other=0.0)
    acc = tl.zeros((BLOCK_R, DIM_PAD), tl.float32)
    for page in range(_seen_pages(position, there, keys, PAGE, CAUSAL)):
        bias = _bias(log_mask, bh, row, there, page, count, pages, GROUP, TOGETHER)
        if tl.max(bias, 0) > float("-inf"):
            change = tl.zeros((BLOCK_R,), tl.float32)
            for part in range(PAGE // BLOCK_N):
                key = page * PAGE + part * BLOCK_N + tl.arange(0, BLOCK_N)
                k_tile = _keys(k, k_base, key, kn, keys, DIM, DIM_PAD)
                weight = tl.exp2(_logits(q_tile, k_tile, bias, key, position, keys, scale, CAUSAL) - norm[:, None])
                v_tile = _keys(v, v_base, key, vn, keys, DIM, DIM_PAD)
                dlogits = weight * (
                    dot(g_tile, tl.trans(v_tile), tl.zeros((BLOCK_R, BLOCK_N), tl.float32)) - own[:, None]
                )
                acc = dot(dlogits.to(k_tile.dtype), k_tile, acc)
                change += tl.sum(dlogits, 1)
            if dmask is not None:
                tl.store(dmask + (start + row) * pages + page, change, mask=there & (row * 0 + page < pages))
    channel = tl.arange(0, DIM_PAD)
    place = (start + row)[:, None] * DIM + channel[None, :]
    tl.store(dq + place, (acc * scale).to(dq.dtype.element_ty), mask=there[:, None] & (channel < DIM)[None, :])


@triton.jit
def _backward_keys(
    q, k, v, log_mask, grad, lse, delta, dk, dv, kb, kh, kn, vb, vh, vn, kv_heads, count, keys, pages, first, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores dk, dv [B, Hkv, keys, DIM]"""
    bh, k_base, v_base = _place(kv_heads, kb, kh, vb, vh)
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    page = tl.program_id(0) * BLOCK_N // PAGE
    k_tile, v_tile = _keys(k, k_base, key, kn, keys, DIM, DIM_PAD), _keys(v, v_base, key, vn, keys, DIM, DIM_PAD)
    start = bh.to(tl.int64) * count
    k_acc, v_acc = tl.zeros((BLOCK_N, DIM_PAD), tl.float32), tl.zeros((BLOCK_N, DIM_PAD), tl.float32)
    begin = 0
    if CAUSAL:  # skip queries before these keys, which do not see them
        begin = tl.maximum(0, tl.program_id(0) * BLOCK_N - first) * GROUP // BLOCK_R * BLOCK_R
    for at in range(begin, count, BLOCK_R):
        row = at + tl.arange(0, BLOCK_R)
        there, position = row < count, first + row // GROUP
        bias = _bias(log_mask, bh, row, there, page, count, pages, GROUP, TOGETHER)
        if tl.max(bias, 0) > float("-inf"):
            q_tile = _rows(q, start, row, there, DIM, DIM_PAD)
            norm = tl.load(lse + start + row, mask=there, other=0.0) * LOG2E
            weight = tl.exp2(_logits(q_tile, k_tile, bias, key, position, keys, scale, CAUSAL) - norm[:, None])
            g_tile = _rows(grad, start, row, there, DIM, DIM_PAD)
            v_acc = dot(tl.trans(weight.to(g_tile.dtype)), g_tile, v_acc)
            own = tl.load(delta + start + row, mask=there, other=0.0)
            dlogits = weight * (dot(g_tile, tl.trans(v_tile), tl.zeros((BLOCK_R, BLOCK_N), tl.float32)) - own[:, None])
            k_acc = dot(tl.trans(dlogits.to(q_tile.dtype)), q_tile, k_acc)
    channel = tl.arange(0, DIM_PAD)
    place = (bh.to(tl.int64) * keys + key)[:, None] * DIM + channel[None, :]
    mask = (key < keys)[:, None] & (channel < DIM)[None, :]
    tl.store(dk + place, (k_acc * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + place, v_acc.to(dv.dtype.element_ty), mask=mask)
