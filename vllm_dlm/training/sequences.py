"""Finds the sequences in a batch with padding or packing, and computes attention for each without padding."""

from dataclasses import dataclass
from itertools import groupby, pairwise

import torch


@dataclass(frozen=True)
class Span:
    """One sequence: keys start … stop - 1 of a row. The first `prompt` of them are the prompt."""

    row: int
    start: int
    stop: int
    prompt: int = 0

    def __len__(self) -> int:
        return self.stop - self.start


def spans_of(batch: int, keys: int, ids=None, cu_seqlens=None, prompt_mask=None) -> list[Span]:
    """Spans of a batch. ids [B, N]: 0 for padding; adjacent keys with the same value form a sequence. cu_seqlens
    [S + 1]: borders of the sequences of a single row. prompt_mask [B, N] bool: first tokens of each sequence."""
    if cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        found = [(0, start, stop) for start, stop in pairwise(edges) if stop > start]
    elif ids is not None:
        found = []
        for row, values in enumerate(ids.tolist()):
            at = 0
            for value, run in groupby(values):
                length = len(list(run))
                if value:
                    found.append((row, at, at + length))
                at += length
    else:
        found = [(row, 0, keys) for row in range(batch)]
    if prompt_mask is None:
        return [Span(*place) for place in found]
    before = torch.nn.functional.pad(prompt_mask.long().cumsum(1), (1, 0)).tolist()
    return [Span(row, start, stop, before[row][stop] - before[row][start]) for row, start, stop in found]


def restarts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """position_ids [B, N] -> ids of packed sequences, or None if positions are consecutive"""
    jumps = position_ids.diff(dim=1) != 1
    if not bool(jumps.any()):
        return None
    return torch.nn.functional.pad(jumps.cumsum(1), (1, 0)) + 1


def attend_by_span(attend, q, k, v, spans: list[Span]):
    """Attention span by span: q [B, H, T, D], queries of the last T of N positions -> [B, H, T, D]. `attend(q, k, v,
    prompt)` gets sequences of the same length and prompt length at once. Queries in no span give zeros."""
    (batch, _, count, _), keys = q.shape, k.shape[2]
    if len(spans) == batch and all(len(s) == keys and s.prompt == spans[0].prompt for s in spans):
        return attend(q, k, v, spans[0].prompt)
    first = keys - count
    kinds: dict[tuple, list[Span]] = {}
    for span in spans:
        if span.stop > first:
            asked = span.stop - max(span.start, first)
            kinds.setdefault((len(span), asked, span.prompt), []).append(span)
    done: dict[Span, torch.Tensor] = {}
    for (_, asked, prompt), members in kinds.items():
        queries = torch.stack([q[s.row, :, s.stop - first - asked : s.stop - first] for s in members])
        cut = [torch.stack([x[s.row, :, s.start : s.stop] for s in members]) for x in (k, v)]
        done.update(zip(members, attend(queries, *cut, prompt), strict=True))
    rows = []
    for row in range(batch):
        pieces, at = [], first
        for span in sorted((s for s in done if s.row == row), key=lambda s: s.start):
            start = max(span.start, first)
            pieces += [q.new_zeros(q.shape[1], start - at, v.shape[3]), done[span]]
            at = span.stop
        pieces.append(q.new_zeros(q.shape[1], keys - at, v.shape[3]))
        rows.append(torch.cat(pieces, 1))
    return torch.stack(rows)
