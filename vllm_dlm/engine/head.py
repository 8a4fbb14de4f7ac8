"""The output head: logits for the rows that need them, a bounded piece at a time, reduced at once.

Rows that are decoded alike (same algorithm, greedy or not, guided or not) are
taken together whoever they belong to. Never more than `max_logits` logits
exist; that buffer is part of the memory profile.
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

from vllm_dlm.engine import allowed, noise
from vllm_dlm.engine.canvas import NOTHING
from vllm_dlm.engine.noise import row_keys, signed
from vllm_dlm.engine.request import Denoising, Logprobs
from vllm_dlm.engine.upload import Upload
from vllm_dlm.plugins.decoding.base import LogitRows, Proposal, at_token


def max_logits(device: torch.device) -> int:
    """Logits alive at once in float32; sampling adds two float64 buffers of that many elements. A GPU reads the head's
    weights again for each piece, so pieces are large there."""
    return 1 << 23 if device.type == "cpu" else 1 << 27


NO_PROPOSAL = Proposal(NOTHING, np.zeros(0), np.zeros(0))


@dataclass
class HeadRequest:
    """Candidate rows of one request."""

    state: Denoising
    positions: np.ndarray  # [C] canvas positions to decode
    rows: np.ndarray = field(default_factory=lambda: NOTHING)  # [C] rows of the hidden states that predict them
    guide_rows: np.ndarray = field(default_factory=lambda: NOTHING)  # [C] the same rows in the guidance stream
    proposal: Proposal = field(default_factory=lambda: NO_PROPOSAL)  # numpy arrays, set by Head.run
    logprobs: list[Logprobs] | None = None
    best: np.ndarray | None = None  # [n, C] see Head.best
    drafts: list["HeadRequest"] = field(default_factory=list)  # of the same step, see Decoding.canvases
    shadow: "HeadRequest | None" = None  # of the tokens that stand in the block, see Decoding.revokes

    @property
    def all(self) -> list["HeadRequest"]:
        return [self, *self.drafts, *([self.shadow] if self.shadow else [])]

    @property
    def finite(self) -> bool:
        """A row of logits with a NaN or an infinity in it makes no probability."""
        return bool(np.isfinite(self.proposal.prob).all())

    @property
    def kind(self):
        sampling, decoding = self.state.sampling, self.state.options.decoding
        guided, constrained, unread = decoding.cfg_scale > 0, self.state.holes is not None, self.state.canvas.unread
        return type(decoding), sampling.greedy, sampling.filtered, guided, sampling.num_logprobs, constrained, unread


class Head:
    def __init__(self, compute_logits, config, max_logits: int):
        self.compute_logits = compute_logits  # [R, D] -> [R, V], all ranks hold all of it
        self.config, self.vocab_size = config, config.vocab_size
        self.max_rows = max(1, max_logits // config.vocab_size)
        #: logits [R, V] -> [n, R] float64: what the live view reads of them
        self.best: Callable[[torch.Tensor], torch.Tensor] | None = None

    def run(self, hidden_TD: torch.Tensor, requests: list[HeadRequest]) -> None:
        """Sets `proposal` (and `logprobs`) of every request."""
        upload = Upload(hidden_TD.device)
        alike = self.prepare(requests, upload)
        upload.send()
        self.read(hidden_TD, alike)

    def prepare(self, requests: list[HeadRequest], upload: Upload) -> list["Alike"]:
        """What `read` needs on the device; before the forward, which then need not wait for it."""
        kinds = defaultdict(list)
        for request in requests:
            if len(request.rows):  # else no masked position is read in this step
                kinds[request.kind].append(request)
        return [Alike.of(requests, self.vocab_size, upload) for requests in kinds.values()]

    def read(self, hidden_TD: torch.Tensor, kinds: list["Alike"]) -> None:
        parts = [self._proposed(hidden_TD, alike) for alike in kinds]
        if not parts:
            return
        # One transfer for all; float64 holds every token id exactly.
        most = max(map(len, parts))
        filled_up = [part if len(part) == most else F.pad(part, (0, 0, 0, most - len(part))) for part in parts]
        found = torch.cat(filled_up, 1).cpu().numpy()  # [3 + noted, R]
        token, score, prob, noted = found[0].astype(np.int64), found[1], found[2], found[3:]
        start = 0
        for alike in kinds:
            first = start
            for request in alike.requests:
                own = slice(start, start := start + len(request.rows))
                numbers = request.state.options.decoding.noted
                request.proposal = Proposal(
                    token[own], score[own], prob[own], noted[:numbers, own] if numbers else None
                )
                if self.best is not None:
                    request.best = noted[numbers : numbers + alike.best_rows, own]
                if alike.logprobs is not None:
                    request.logprobs = alike.logprobs[own.start - first : own.stop - first]

    def _proposed(self, hidden_TD: torch.Tensor, alike: "Alike") -> torch.Tensor:
        """-> [3 + noted, R] float64: token, score and probability of each row, and what the decoding notes of it"""
        decoding, _, _, guided, num_logprobs, _, _ = alike.requests[0].kind
        parts = []
        for start in range(0, len(alike.rows), self.max_rows):
            piece = slice(start, start + self.max_rows)
            logits_RV = self.compute_logits(hidden_TD[alike.rows[piece]]).float()
            if guided:
                guide_RV = self.compute_logits(hidden_TD[alike.guide_rows[piece]]).float()
                scale_R1 = alike.options["cfg_scale"][piece, None] + 1
                logits_RV = guide_RV + scale_R1 * (logits_RV - guide_RV)
            raw_RV = logits_RV.log_softmax(-1) if num_logprobs is not None else None
            if alike.allowed is not None:
                rows, which = alike.allowed
                allowed.rule_out_others(logits_RV, rows, which[piece])
            if alike.standing is not None:
                proposal = judged(logits_RV, alike.standing[piece], decoding.noted)
            else:
                proposal = decoding.propose(logits_RV, self._logit_rows(alike, piece))
            part = torch.stack([proposal.token.double(), proposal.score.double(), proposal.prob.double()])
            if proposal.noted is not None:
                part = torch.cat([part, proposal.noted])
            if self.best is not None:
                best = self.best(logits_RV)
                alike.best_rows, part = len(best), torch.cat([part, best])
            parts.append(part)
            if num_logprobs is not None:
                alike.logprobs = (alike.logprobs or []) + _logprobs(raw_RV, proposal.token, num_logprobs)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _logit_rows(self, alike: "Alike", piece: slice) -> LogitRows:
        keys_R, sampling = alike.keys[piece], alike.requests[0].state.sampling
        return LogitRows(
            temperature=alike.temperature[piece],
            top_p=alike.top_p[piece],
            top_k=alike.top_k[piece],
            options={field: column[piece] for field, column in alike.options.items()},
            eos_id=self.config.eos_token_id,
            eot_id=self.config.eot_token_id,
            mask_id=self.config.mask_token_id,
            sampled=not sampling.greedy,
            filtered=sampling.filtered,
            exponential=lambda: noise.exponential(keys_R, self.vocab_size),
            uniform=lambda: noise.uniform(keys_R),
            memory={name: column[piece] for name, column in alike.memory.items()},
        )


@dataclass
class Alike:
    """Candidate rows of requests that are decoded alike, R rows, and their parameters."""

    requests: list[HeadRequest]
    rows: torch.Tensor  # [R] of the hidden states
    guide_rows: torch.Tensor  # [R] of guided ones
    temperature: torch.Tensor  # [R]
    top_p: torch.Tensor  # [R]
    top_k: torch.Tensor  # [R]
    options: dict[str, torch.Tensor]  # [R] each
    keys: torch.Tensor  # [R] of their noise
    memory: dict[str, torch.Tensor] = field(default_factory=dict)  # [R, …] of the decoding's, see Memory
    allowed: tuple[torch.Tensor, torch.Tensor] | None = None  # of templates: rows of bits, [S, W], and whose: [R]
    standing: torch.Tensor | None = None  # [R] tokens of drafts that are read
    logprobs: list[Logprobs] | None = None
    best_rows: int = 0  # that the live view added

    @classmethod
    def of(cls, requests: list[HeadRequest], vocab_size: int, upload: Upload) -> "Alike":
        counts = [len(request.rows) for request in requests]
        states = [request.state for request in requests]
        decoding: Any = type(states[0].options.decoding)
        numbers, flags = numeric_fields(decoding)
        real = [
            (s.sampling.temperature, s.sampling.top_p, *(getattr(s.options.decoding, name) for name in numbers))
            for s in states
        ]
        whole = [(s.sampling.top_k or vocab_size, signed(s.sampling.seed), s.canvas.block, s.canvas.block_step)
                 for s in states]  # fmt: skip
        true = [tuple(getattr(s.options.decoding, name) for name in flags) for s in states]
        temperature, top_p, *options = upload(of_rows(real, np.float32, counts))  # None becomes NaN
        top_k, seeds, blocks, steps = of_rows(whole, np.int64, counts)
        positions = np.concatenate([request.positions for request in requests])
        parts = [np.concatenate([r.rows for r in requests]), top_k, row_keys(seeds, blocks, steps, positions)]
        if any(len(r.guide_rows) for r in requests):
            parts.append(np.concatenate([r.guide_rows for r in requests]))
        rows, top_k_R, keys, *guide = upload(np.stack(parts))
        columns = dict(zip(flags, upload(of_rows(true, np.bool_, counts)), strict=True)) if flags else {}
        columns |= dict(zip(numbers, options, strict=True))
        guide_rows, memory = guide[0] if guide else rows[:0], remembered(requests, upload)
        bits = None
        if states[0].holes is not None:
            one, other = allowed.table([(r.state.holes, r.positions) for r in requests], vocab_size)
            bits = upload(one), upload(other)
        standing = None
        if states[0].canvas.unread:
            standing = upload(np.concatenate([r.state.canvas.tokens[r.positions] for r in requests]))
        return cls(requests, rows, guide_rows, temperature, top_p, top_k_R, columns, keys, memory, bits, standing)


def judged(logits_RV: torch.Tensor, token_R: torch.Tensor, noted: int) -> Proposal:
    """How probable tokens that stand are. The decoding notes nothing of them."""
    prob_R = (at_token(logits_RV, token_R) - logits_RV.logsumexp(-1)).exp_()
    nothing = torch.zeros(noted, len(token_R), dtype=torch.float64, device=prob_R.device) if noted else None
    return Proposal(token_R, prob_R, prob_R, nothing)


def remembered(requests: list[HeadRequest], upload: Upload) -> dict[str, torch.Tensor]:
    """Columns of their memories, one below the other, as wide as the widest"""
    own = [
        request.state.memory.columns(request.positions, request.state.canvas.tokens[request.positions])
        for request in requests
        if request.state.memory
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


def of_rows(values: list[tuple], dtype, counts: list[int]) -> np.ndarray:
    """A tuple of each request, repeated for its rows: [values of a tuple, R]"""
    return np.ascontiguousarray(np.repeat(np.array(values, dtype).T, counts, axis=1))


@cache
def numeric_fields(decoding: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of a decoding's fields that are numbers, and of those that are flags."""
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
