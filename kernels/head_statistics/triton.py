"""Each row's vocabulary is split among programs, and one program per row merges their results.

A program walks over its share of the tokens and keeps the highest and the
second-highest logit, a running sum of exponentials, and the best token.
"""

import torch
import triton
import triton.language as tl

from vllm_dlm.kernels.triton_utils import processors

#: tokens per tile, and the maximum number of shares per row
TILE, MOST_SPLITS = 2048, 32
NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _flag(flags, r):
    """Whether row r is marked, as an integer"""
    return 0 if flags is None else tl.load(flags + r).to(tl.int32)


@triton.jit
def _logits(logits, start, end, eos_id, eot_id, suppressed, unlikely, TILE: tl.constexpr):
    """-> token ids [TILE], their logits for choosing a token, and their logits for probabilities"""
    token = start + tl.arange(0, TILE)
    value = tl.load(logits + token, mask=token < end, other=float("-inf")).to(tl.float32)
    value = tl.where((token == eos_id) & (suppressed + token * 0 > 0), float("-inf"), value)
    ends = ((token == eos_id) | (token == eot_id)) & (unlikely + token * 0 > 0)
    return token, value, tl.where(ends, float("-inf"), value)


@triton.jit
def _second(values, highest):
    """Second-highest value, given the highest"""
    ties = tl.sum((values == highest).to(tl.int32), 0)
    return tl.where(ties > 1, highest, tl.max(tl.where(values < highest, values, float("-inf")), 0))


@triton.jit(do_not_specialize_on_alignment=["suppress_eos", "unlikely_ends"])
def _share_kernel(
    logits,
    suppress_eos,
    unlikely_ends,
    parts,
    tokens,
    vocabulary,
    share,
    stride_row,
    mask_id,
    eos_id,
    eot_id,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Stores parts [R, 4, SPLITS] (highest logit, sum of exponentials, second-highest logit, logit of the best token)
    and tokens [R, SPLITS]"""
    r, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    suppressed, unlikely = _flag(suppress_eos, r), _flag(unlikely_ends, r)
    logits += r * stride_row
    highest = tl.full([], float("-inf"), tl.float32)
    second, best = highest, highest
    total = tl.full([], 0.0, tl.float32)
    chosen = tl.full([], 0, tl.int32)
    end = tl.minimum((split + 1) * share, vocabulary)
    for start in range(split * share, end, TILE):
        token, open_, value = _logits(logits, start, end, eos_id, eot_id, suppressed, unlikely, TILE)
        open_ = tl.where(token == mask_id, float("-inf"), open_)
        top = tl.max(open_, 0)
        first = tl.min(tl.where(open_ == top, token, NO_TOKEN), 0)
        chosen = tl.where(top > best, first, chosen)
        best = tl.maximum(best, top)
        top = tl.max(value, 0)
        second = tl.maximum(tl.minimum(highest, top), tl.maximum(second, _second(value, top)))
        higher = tl.maximum(highest, top)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(value - shift), 0)
        highest = higher
    parts += r * 4 * SPLITS + split
    tl.store(parts, highest)
    tl.store(parts + SPLITS, total)
    tl.store(parts + 2 * SPLITS, second)
    tl.store(parts + 3 * SPLITS, best)
    tl.store(tokens + r * SPLITS + split, chosen)


@triton.jit(do_not_specialize_on_alignment=["suppress_eos", "unlikely_ends"])
def _row_kernel(
    logits, suppress_eos, unlikely_ends, parts, tokens, token_out, prob_out, margin_out, lse_out, entropy_out,
    vocabulary, stride_row, eos_id, eot_id, TILE: tl.constexpr, SPLITS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    suppressed, unlikely = _flag(suppress_eos, r), _flag(unlikely_ends, r)
    split = tl.arange(0, SPLITS)
    parts += r * 4 * SPLITS + split
    tops, totals, seconds = tl.load(parts), tl.load(parts + SPLITS), tl.load(parts + 2 * SPLITS)
    bests, chosen = tl.load(parts + 3 * SPLITS), tl.load(tokens + r * SPLITS + split)
    best = tl.max(bests, 0)
    token = tl.min(tl.where(bests == best, chosen, NO_TOKEN), 0)
    highest = tl.max(tops, 0)
    second = tl.maximum(_second(tops, highest), tl.max(seconds, 0))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(totals * tl.exp(tops - shift), 0)
    picked = tl.where(((token == eos_id) | (token == eot_id)) & (unlikely > 0), float("-inf"), best)
    tl.store(token_out + r, token.to(tl.int64))
    # if all logits are -inf this is 0 / 0, and NaN is the intended result
    tl.store(prob_out + r, tl.exp(picked - shift) / total)
    tl.store(margin_out + r, (tl.exp(highest - shift) - tl.exp(second - shift)) / total)
    tl.store(lse_out + r, shift + tl.log(total))
    if ENTROPY:
        summed = tl.zeros([TILE], tl.float32)
        for start in range(0, vocabulary, TILE):
            _, _, value = _logits(
                logits + r * stride_row, start, vocabulary, eos_id, eot_id, suppressed, unlikely, TILE
            )
            prob = tl.exp(value - shift) / total
            summed += prob * tl.log(prob + 1e-10)
        tl.store(entropy_out + r, tl.sum(summed, 0))


def head_statistics(logits, mask_id, eos_id, eot_id, suppress_eos, unlikely_ends, entropy):
    """-> token, prob, margin, logsumexp, entropy, see dispatch.py"""
    (rows, vocabulary), device = logits.shape, logits.device
    token = torch.empty(rows, dtype=torch.int64, device=device)
    prob, margin, lse = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    sums = torch.empty(rows if entropy else 0, dtype=torch.float32, device=device)
    if rows:
        tiles = triton.cdiv(vocabulary, TILE)
        # a power of two limits how many kernels are compiled
        wanted = min(4 * processors(device) // rows, tiles, MOST_SPLITS)
        splits = 1 << max(wanted, 1).bit_length() - 1
        parts = torch.empty(rows, 4, splits, dtype=torch.float32, device=device)
        tokens = torch.empty(rows, splits, dtype=torch.int32, device=device)
        inputs, share = (logits, suppress_eos, unlikely_ends, parts, tokens), triton.cdiv(tiles, splits) * TILE
        stride, ends, shape = logits.stride(0), (eos_id, eot_id), {"TILE": TILE, "SPLITS": splits}
        _share_kernel[rows, splits](*inputs, vocabulary, share, stride, mask_id, *ends, **shape, num_warps=4)
        outputs = token, prob, margin, lse, sums
        _row_kernel[rows,](*inputs, *outputs, vocabulary, stride, *ends, **shape, ENTROPY=entropy, num_warps=8)
    return token, prob, margin, lse, sums
