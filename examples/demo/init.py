"""A starting point that already knows how to look something up.

From random weights a model this small spends its whole hour guessing values: it finds no
gradient towards "find the earlier place that reads like here, and copy what stood there". So
that circuit is put in by hand, once, and training only has to sharpen and extend it.

The residual stream is given a layout (width 192):

    0        a constant                     the same for every token, so heads can read position
    1        "I am a mask"                  so that masked places can be avoided as sources
    2..95    the token's own code           equal norms: RMSNorm then keeps dim 0 equal as well
    96..191  three slots of one head each   filled by layer 0 with tokens some places back, see Offsets

Layer 0 attends by offset and fills the slots. In layers 1 and 2 some heads use the same matrix
for queries and keys and read one slot, so a place attends to where the same token stood the same
number of places back: the digit after "alice is 12" finds the digit after "alice is 12" in the
prompt. Each of them copies a third of the token code. The head starts aligned with the embedding,
so what was copied is also said. The offsets fit the needle's wording; other wordings are learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import tokenizer as tok
from .model import Block, DemoLLaDA

CONSTANT, IS_MASK = 0, 1
TOKEN = slice(2, 96)
SLOTS_FROM = 96
# layer -> {head: slot it matches on}
MATCHING_HEADS = {1: {3: 0, 4: 1, 5: 2}, 2: {0: 2, 1: 0, 2: 1}}


@dataclass(frozen=True)
class Offsets:
    """Where heads look, in places from their own."""

    slots: tuple[int, int, int]  # what the slots are filled with
    first: tuple[int, int, int]  # the other heads of layer 0
    second: tuple[int, int, int]  # the heads of layer 1 that match nothing


RECALL = Offsets(slots=(-3, -4, -5), first=(-6, -7, -1), second=(-1, 1, -3))  # of "The code of alice is 48213"
WALK = Offsets(slots=(-1, -2, -3), first=(1, 2, -4), second=(-1, 1, -2))  # of "alice > lamp;"

TOKEN_NORM, CONSTANT_SIZE = 6.8, 4.0
POSITION_SHARPNESS, MATCH_SCALE, MASK_PENALTY, HEAD_ALIGNMENT = 1.2, 0.5, 2.0, 0.15
RANDOM_SHRINK = 0.35
SLOWEST_FOR_OFFSETS = 0.015  # slower pairs tell no neighbours apart, they only make scores large


def _rows(head: int, head_dim: int) -> slice:
    return slice(head * head_dim, (head + 1) * head_dim)


def _orthogonal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))


def _attend_at_offset(block: Block, head: int, offset: int, frequencies: Tensor) -> None:
    """Score sum_i cos(f_i (j - i - offset)): both sides see the constant, RoPE does the rest."""
    rows = _rows(head, 2 * len(frequencies))
    turn = frequencies * offset
    size = POSITION_SHARPNESS * (frequencies > SLOWEST_FOR_OFFSETS)
    for projection in (block.q_proj, block.k_proj):
        projection.weight[rows] *= 0.03
    block.q_proj.weight[rows, CONSTANT] = torch.cat([size * turn.cos(), size * turn.sin()])
    block.k_proj.weight[rows, CONSTANT] = torch.cat([size, 0 * size])


def _fill_slot(block: Block, head: int, slot: int, head_dim: int) -> None:
    rows = _rows(head, head_dim)
    block.v_proj.weight[rows] = 0
    block.v_proj.weight[rows, TOKEN] = _orthogonal(head_dim, TOKEN.stop - TOKEN.start)
    block.attn_out.weight[:, rows] = 0
    start = SLOTS_FROM + slot * head_dim
    block.attn_out.weight[start : start + head_dim, rows] = 0.6 * torch.eye(head_dim)


def _match_on_slot(block: Block, head: int, slot: int, head_dim: int, copied: Tensor) -> None:
    """W_q = W_k on the slow rotary pairs only, which barely turn over the length of a prompt."""
    rows, half = _rows(head, head_dim), head_dim // 2
    match = torch.randn(head_dim, head_dim) * MATCH_SCALE
    match[torch.arange(head_dim) % half < half // 2] = 0
    match[[half - 1, head_dim - 1]] = 0  # the slowest pair carries the mask penalty
    start = SLOTS_FROM + slot * head_dim
    for projection in (block.q_proj, block.k_proj):
        projection.weight[rows] = 0
        projection.weight[rows, start : start + head_dim] = match
    block.q_proj.weight[rows.start + half - 1, CONSTANT] = 1.0
    block.k_proj.weight[rows.start + half - 1, IS_MASK] = -MASK_PENALTY
    block.v_proj.weight[rows] = 0
    block.v_proj.weight[rows, TOKEN] = copied
    block.attn_out.weight[:, rows] = 0
    block.attn_out.weight[TOKEN, rows] = copied.T


@torch.no_grad()
def build_lookup_circuit(model: DemoLLaDA, offsets: Offsets = RECALL) -> None:
    shape, blocks = model.shape, model.parts.blocks
    head_dim, frequencies = shape.head_dim, shape.rope_frequencies()
    if shape.width != SLOTS_FROM + len(offsets.slots) * head_dim or shape.layers < 3:
        raise ValueError("the residual layout is made for width 192, heads of 32, 3 or more layers")

    embedding = model.parts.wte.weight  # [V, W]
    embedding.zero_()
    embedding[:, TOKEN].normal_()
    embedding[:, TOKEN] *= TOKEN_NORM / embedding[:, TOKEN].norm(dim=1, keepdim=True)
    embedding[tok.MASK] = 0
    embedding[tok.MASK, IS_MASK] = TOKEN_NORM
    embedding[:, CONSTANT] = CONSTANT_SIZE

    for block in blocks:
        block.ff_out.weight *= RANDOM_SHRINK
        block.attn_out.weight *= RANDOM_SHRINK
        for reader in (block.v_proj, block.ff_proj, block.up_proj):
            reader.weight[:, [CONSTANT, IS_MASK]] = 0

    for head, offset in enumerate(offsets.slots + offsets.first):
        _attend_at_offset(blocks[0], head, offset, frequencies)
    for slot in range(len(offsets.slots)):
        _fill_slot(blocks[0], slot, slot, head_dim)
    blocks[0].attn_out.weight[[CONSTANT, IS_MASK]] = 0

    codes = TOKEN.stop - TOKEN.start
    for layer, heads in MATCHING_HEADS.items():
        basis = _orthogonal(codes, codes)
        for part, (head, slot) in enumerate(heads.items()):
            copied = torch.zeros(head_dim, codes)
            third = basis[part * (codes // 3) :][:head_dim]
            copied[: len(third)] = third
            _match_on_slot(blocks[layer], head, slot, head_dim, copied)
    for head, offset in enumerate(offsets.second):
        _attend_at_offset(blocks[1], head, offset, frequencies)

    model.parts.ff_out.weight.normal_(0, 0.02)
    model.parts.ff_out.weight[:, TOKEN] += HEAD_ALIGNMENT * embedding[:, TOKEN]
