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
            return row[:place + 1]
    return row


@torch.no_grad()
def decode(model: DemoLLaDA, prompts_BP: Tensor, canvas: int, block_length: int = 8,
           stale_prompt: bool = False) -> list[list[int]]:
    """Answers to prompts of one length. `stale_prompt` never recomputes the prompt's K/V."""
    rows, length = prompts_BP.shape
    canvas_BR = torch.full((rows, canvas), tok.MASK)
    block_length = min(block_length, canvas)
    kept_kv = None
    if stale_prompt:
        seen = torch.cat([prompts_BP, canvas_BR], 1)
        kept_kv = [(k[:, :, :length], v[:, :, :length]) for k, v in model.keys_and_values(seen)]
    going = torch.arange(rows)
    for step in range(canvas):
        live_BR = canvas_BR[going]
        if kept_kv is None:
            logits_BRV = model(torch.cat([prompts_BP[going], live_BR], 1), tail=canvas)
        else:
            logits_BRV = model.forward_on([(k[going], v[going]) for k, v in kept_kv], live_BR)
        block_end = (step // block_length + 1) * block_length
        confidence_BR, token_BR = logits_BRV[:, :block_end].softmax(-1).max(-1)
        confidence_BR[live_BR[:, :block_end] != tok.MASK] = -torch.inf
        place_B = confidence_BR.argmax(1)
        canvas_BR[going, place_B] = token_BR.gather(1, place_B[:, None])[:, 0]
        going = going[[answered(row) is None for row in canvas_BR[going].tolist()]]
        if not len(going):
            break
    return [answered(row) or [] for row in canvas_BR.tolist()]


def answers(model: DemoLLaDA, samples: list[Sample], canvas: int, block_length: int = 8,
            stale_prompt: bool = False) -> list[list[int]]:
    """Answers in the order of the samples, decoded in batches of equal prompt length."""
    by_length = defaultdict(list)
    for index, sample in enumerate(samples):
        by_length[len(sample.prompt_ids)].append(index)
    found: list[list[int]] = [[] for _ in samples]
    for length, indices in by_length.items():
        size = max(1, TOKENS_PER_BATCH // (length + canvas))
        for start in range(0, len(indices), size):
            part = indices[start:start + size]
            prompts = torch.tensor([samples[i].prompt_ids for i in part])
            for i, answer in zip(part, decode(model, prompts, canvas, block_length, stale_prompt)):
                found[i] = answer
    return found
