"""The output head: computes logits of the rows that are read, in pieces of bounded size, and reduces them to proposals.

Readings of one kind (same decoding, greedy or not, guided or not) are decoded
together, across requests. At most `max_logits` logits exist at a time. That
buffer is part of the memory profile.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F

from vllm_dlm.canvas import noise
from vllm_dlm.canvas.noise import row_keys, signed
from vllm_dlm.canvas.stream import Logprobs, Reading
from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, at_token
from vllm_dlm.step.upload import Upload


def max_logits(device: torch.device) -> int:
    """Maximum number of float32 logits at a time; sampling adds two float64 buffers of the same size. Pieces are larger
    on a GPU, which reads the head's weights again for each piece."""
    return 1 << 23 if device.type == "cpu" else 1 << 27


class Head:
    def __init__(self, compute_logits, config, max_logits: int):
        self.compute_logits = compute_logits  # [R, D] -> [R, V], the full result on every rank
        self.config, self.vocab_size = config, config.vocab_size
        self.max_rows = max(1, max_logits // config.vocab_size)
        #: logits [R, V] -> [n, R] float64, for the live view
        self.best: Callable[[torch.Tensor], torch.Tensor] | None = None

    def run(self, hidden_TD: torch.Tensor, readings: list[Reading]) -> None:
        """Sets `proposal` (and `logprobs`) of every reading."""
        upload = Upload(hidden_TD.device)
        batches = self.prepare(readings, upload)
        upload.send()
        self.read(hidden_TD, batches)

    def prepare(self, readings: list[Reading], upload: Upload) -> list["HeadBatch"]:
        """Inputs of `read` on the device, created before the forward so that the device does not wait for them."""
        kinds = defaultdict(list)
        for reading in readings:
            if len(reading.rows):  # otherwise the step reads no position
                kinds[reading.kind].append(reading)
        return [HeadBatch.gather(alike, self.vocab_size, upload) for alike in kinds.values()]

    def read(self, hidden_TD: torch.Tensor, batches: list["HeadBatch"]) -> None:
        parts = [self._proposed(hidden_TD, batch) for batch in batches]
        if not parts:
            return
        # One transfer for all readings; float64 represents every token id exactly.
        most = max(map(len, parts))
        padded = [part if len(part) == most else F.pad(part, (0, 0, 0, most - len(part))) for part in parts]
        found = torch.cat(padded, 1).cpu().numpy()  # [3 + noted, R]
        token, score, prob, noted = found[0].astype(np.int64), found[1], found[2], found[3:]
        start = 0
        for batch in batches:
            first = start
            for reading in batch.readings:
                own = slice(start, start := start + len(reading.rows))
                count = reading.state.noted
                reading.proposal = Proposal(token[own], score[own], prob[own], noted[:count, own] if count else None)
                if self.best is not None:
                    reading.best = noted[count : count + batch.best_rows, own]
                if batch.logprobs is not None:
                    reading.logprobs = batch.logprobs[own.start - first : own.stop - first]

    def _proposed(self, hidden_TD: torch.Tensor, batch: "HeadBatch") -> torch.Tensor:
        """-> [3 + noted, R] float64: token, score and probability of each row, and the values that the decoding
        notes"""
        state = batch.readings[0].state
        decoding, num_logprobs = state.options.decoding, state.sampling.num_logprobs
        parts = []
        for start in range(0, len(batch.rows), self.max_rows):
            piece = slice(start, start + self.max_rows)
            logits_RV = self._logits(hidden_TD, batch, piece)
            raw_RV = logits_RV.log_softmax(-1) if num_logprobs is not None else None
            if batch.allowed is not None:
                batch.allowed.rule_out(logits_RV, piece)
            if batch.judged is not None:
                proposal = judged(logits_RV, batch.judged[piece], state.noted)
            else:
                proposal = decoding.propose(logits_RV, self._logit_rows(batch, piece))
            part = torch.stack([proposal.token.double(), proposal.score.double(), proposal.prob.double()])
            if proposal.noted is not None:
                part = torch.cat([part, proposal.noted])
            if self.best is not None:
                best = self.best(logits_RV)
                batch.best_rows, part = len(best), torch.cat([part, best])
            parts.append(part)
            if num_logprobs is not None:
                batch.logprobs = (batch.logprobs or []) + _logprobs(raw_RV, proposal.token, num_logprobs)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _logits(self, hidden_TD: torch.Tensor, batch: "HeadBatch", piece: slice) -> torch.Tensor:
        """[R, V] float32; with guidance, combined with the logits of the unconditional stream"""
        logits_RV = self.compute_logits(hidden_TD[batch.rows[piece]]).float()
        if not len(batch.guide_rows):
            return logits_RV
        guide_RV = self.compute_logits(hidden_TD[batch.guide_rows[piece]]).float()
        scale_R1 = batch.options["cfg_scale"][piece, None] + 1
        return guide_RV + scale_R1 * (logits_RV - guide_RV)

    def _logit_rows(self, batch: "HeadBatch", piece: slice) -> LogitRows:
        keys_R, sampling = batch.keys[piece], batch.readings[0].state.sampling
        return LogitRows(
            temperature=batch.temperature[piece],
            top_p=batch.top_p[piece],
            top_k=batch.top_k[piece],
            options={field: column[piece] for field, column in batch.options.items()},
            eos_id=self.config.eos_token_id,
            eot_id=self.config.eot_token_id,
            mask_id=self.config.mask_token_id,
            sampled=not sampling.greedy,
            filtered=sampling.filtered,
            exponential=lambda: noise.exponential(keys_R, self.vocab_size),
            uniform=lambda: noise.uniform(keys_R),
            memory={name: column[piece] for name, column in batch.memory.items()},
        )


@dataclass
class HeadBatch:
    """Readings of one kind, which are decoded together: R rows and their parameters on the device."""

    readings: list[Reading]
    rows: torch.Tensor  # [R] indices into the hidden states
    guide_rows: torch.Tensor  # [R] the same rows of unconditional streams; [0] without guidance
    temperature: torch.Tensor  # [R]
    top_p: torch.Tensor  # [R]
    top_k: torch.Tensor  # [R]
    options: dict[str, torch.Tensor]  # [R] each
    keys: torch.Tensor  # [R] keys of their noise
    memory: dict[str, torch.Tensor] = field(default_factory=dict)  # [R, …] columns of the decoding's Memory
    allowed: Any = None  # see Constraint
    judged: torch.Tensor | None = None  # [R] given tokens to score
    logprobs: list[Logprobs] | None = None
    best_rows: int = 0  # number of rows added for the live view

    @classmethod
    def gather(cls, readings: list[Reading], vocab_size: int, upload: Upload) -> "HeadBatch":
        first, states = readings[0], [reading.state for reading in readings]
        decoding: Any = type(states[0].options.decoding)
        counts = [len(reading.rows) for reading in readings]
        numbers, flags = numeric_fields(decoding)
        real = [
            (s.sampling.temperature, s.sampling.top_p, *(getattr(s.options.decoding, name) for name in numbers))
            for s in states
        ]
        whole = [
            (s.sampling.top_k or vocab_size, signed(s.sampling.seed), s.canvas.block, s.canvas.block_step)
            for s in states
        ]
        true = [tuple(getattr(s.options.decoding, name) for name in flags) for s in states]
        temperature, top_p, *options = upload(per_row(real, np.float32, counts))  # None becomes NaN
        top_k, seeds, blocks, steps = per_row(whole, np.int64, counts)
        positions = np.concatenate([reading.positions for reading in readings])
        parts = [np.concatenate([r.rows for r in readings]), top_k, row_keys(seeds, blocks, steps, positions)]
        if len(first.guide_rows):
            parts.append(np.concatenate([r.guide_rows for r in readings]))
        rows, top_k_R, keys, *guide = upload(np.stack(parts))
        columns = dict(zip(flags, upload(per_row(true, np.bool_, counts)), strict=True)) if flags else {}
        columns |= dict(zip(numbers, options, strict=True))
        made = cls(
            readings,
            rows,
            guide[0] if guide else rows[:0],
            temperature,
            top_p,
            top_k_R,
            columns,
            keys,
            remembered(readings, upload),
        )
        if first.constraint is not None:
            made.allowed = first.constraint.gather(readings, vocab_size, upload)
        if first.judged:
            made.judged = upload(np.concatenate([reading.tokens for reading in readings]))
        return made


def judged(logits_RV: torch.Tensor, token_R: torch.Tensor, noted: int) -> Proposal:
    """The probabilities of given tokens, with zeros as noted values"""
    prob_R = (at_token(logits_RV, token_R) - logits_RV.logsumexp(-1)).exp_()
    nothing = torch.zeros(noted, len(token_R), dtype=torch.float64, device=prob_R.device) if noted else None
    return Proposal(token_R, prob_R, prob_R, nothing)


def remembered(readings: list[Reading], upload: Upload) -> dict[str, torch.Tensor]:
    """Columns of the decoding's memories, concatenated and padded to the widest"""
    own = [
        reading.state.memory.columns(reading.positions, reading.tokens) for reading in readings if reading.state.memory
    ]
    found = {}
    for name in own[0] if own else ():
        columns = [each[name] for each in own]
        width, dtype = max(column.shape[1] for column in columns), columns[0].dtype
        table = np.full((sum(map(len, columns)), width), -1 if dtype == np.int64 else 0, dtype)
        start = 0
        for column in columns:
            table[start : start + len(column), : column.shape[1]] = column
            start += len(column)
        found[name] = upload(table)
    return found


def per_row(values: list[tuple], dtype, counts: list[int]) -> np.ndarray:
    """One tuple per reading, repeated for its rows -> [values of a tuple, R]"""
    return np.ascontiguousarray(np.repeat(np.array(values, dtype).T, counts, axis=1))


@cache
def numeric_fields(decoding: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a decoding's numeric fields, and of its boolean fields."""
    hints = get_type_hints(decoding)
    kinds = {each.name: set(get_args(hints[each.name])) or {hints[each.name]} for each in fields(decoding)}
    flags = tuple(name for name, types in kinds.items() if types == {bool})
    return tuple(name for name, types in kinds.items() if types <= {int, float, NoneType}), flags


def most_probable(logits_RV: torch.Tensor, count: int) -> torch.Tensor:
    """-> [2 * count, R] float64: tokens, and their probabilities at temperature 1"""
    value_RN, token_RN = logits_RV.topk(min(count, logits_RV.shape[1]))
    prob_RN = (value_RN - logits_RV.logsumexp(-1, keepdim=True)).exp()
    missing = count - value_RN.shape[1]
    return torch.cat([F.pad(part.double(), (0, missing)).T for part in (token_RN, prob_RN)])


def _logprobs(logprobs_RV: torch.Tensor, token_R: torch.Tensor, count: int) -> list[Logprobs]:
    own_R1 = logprobs_RV.gather(1, token_R[:, None])
    rank_R = (logprobs_RV > own_R1).sum(-1) + 1
    value_RN, token_RN = logprobs_RV.topk(min(count, logprobs_RV.shape[1]) if count >= 0 else logprobs_RV.shape[1])
    token_ids = torch.cat([token_R[:, None], token_RN], 1).cpu().numpy()
    values = torch.cat([own_R1, value_RN], 1).cpu().numpy()
    return [Logprobs(*row) for row in zip(token_ids, values, rank_R.tolist(), strict=True)]
