"""LLaDA's block-wise low-confidence decoding, one token per step, by plain full forward passes."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from . import tokenizer as tok
from .model import DemoLLaDA
from .tasks import Sample

TOKENS_PER_BATCH = 8192
ENDS = (tok.EOS, tok.EOT)


def answered(row: list[int]) -> list[int] | None:
    """The delivered answer: up to the first end token, if nothing before that is still masked."""
    for place, token in enumerate(row):
        if token == tok.MASK:
            return None
        if token in ENDS:
            return row[: place + 1]
    return row


@torch.no_grad()
def decode(
    model: DemoLLaDA, prompts_BP: Tensor, canvas: int, block_length: int = 8, refresh: str = "step"
) -> list[list[int]]:
    """Answers to prompts of one length.

    `refresh` says when the prompt's K/V are recomputed: in every "step" (LLaDA itself), at the
    start of every "block", or "never" after the first step.
    """
    rows, length = prompts_BP.shape
    canvas_BR = torch.full((rows, canvas), tok.MASK)
    block_length = min(block_length, canvas)
    going, kept_kv = torch.arange(rows), []
    for step in range(canvas):
        live_BR = canvas_BR[going]
        seen = torch.cat([prompts_BP[going], live_BR], 1)
        if refresh == "step":
            logits_BRV = model(seen, tail=canvas)
        else:
            if step == 0 or (refresh == "block" and step % block_length == 0):
                kept_kv = [(k[:, :, :length], v[:, :, :length]) for k, v in model.keys_and_values(seen)]
            logits_BRV = model.forward_on(kept_kv, live_BR)
        block_end = (step // block_length + 1) * block_length
        confidence_BR, token_BR = logits_BRV[:, :block_end].softmax(-1).max(-1)
        confidence_BR[live_BR[:, :block_end] != tok.MASK] = -torch.inf
        place_B = confidence_BR.argmax(1)
        canvas_BR[going, place_B] = token_BR.gather(1, place_B[:, None])[:, 0]
        unfinished = torch.tensor([answered(row) is None for row in canvas_BR[going].tolist()])
        if not unfinished.any():
            break
        going = going[unfinished]
        kept_kv = [(k[unfinished], v[unfinished]) for k, v in kept_kv]
    return [answered(row) or [] for row in canvas_BR.tolist()]


def answers(
    model: DemoLLaDA, samples: list[Sample], canvas: int, block_length: int = 8, refresh: str = "step"
) -> list[list[int]]:
    """Answers in the order of the samples, decoded in batches of equal prompt length."""
    by_length = defaultdict(list)
    for index, sample in enumerate(samples):
        by_length[len(sample.prompt_ids)].append(index)
    found: list[list[int]] = [[] for _ in samples]
    for length, indices in by_length.items():
        size = max(1, TOKENS_PER_BATCH // (length + canvas))
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            prompts = torch.tensor([samples[i].prompt_ids for i in part])
            for i, answer in zip(part, decode(model, prompts, canvas, block_length, refresh), strict=False):
                found[i] = answer
    return found
