"""The output head: logits for the rows that need them, a bounded piece at a time, reduced at once.

Rows that are decoded alike (same algorithm, greedy or not, guided or not) are
taken together whoever they belong to. Never more than `max_logits` logits
exist; that buffer is part of the memory profile.
"""

from collections import defaultdict
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch

from vllm_dlm.engine import noise
from vllm_dlm.engine.canvas import NOTHING
from vllm_dlm.engine.request import Denoising
from vllm_dlm.plugins.decoding.base import LogitRows, Proposal

#: logits alive at once in float32; sampling adds two float64 buffers of that many elements
MAX_LOGITS = 1 << 23


NO_PROPOSAL = Proposal(NOTHING, np.zeros(0), np.zeros(0))


class Logprobs(NamedTuple):
    """Log-probabilities of one proposed token: itself first, then the most probable ones."""

    token_ids: np.ndarray  # [1 + n]
    values: np.ndarray  # [1 + n]
    rank: int


@dataclass
class HeadRequest:
    """Candidate rows of one request."""

    state: Denoising
    positions: np.ndarray  # [C] canvas positions to decode
    rows: np.ndarray = field(default_factory=lambda: NOTHING)  # [C] rows of the hidden states that predict them
    guide_rows: np.ndarray = field(default_factory=lambda: NOTHING)  # [C] the same rows in the guidance stream
    proposal: Proposal = field(default_factory=lambda: NO_PROPOSAL)  # numpy arrays, set by Head.run
    logprobs: list[Logprobs] | None = None

    @property
    def finite(self) -> bool:
        """A row of logits with a NaN or an infinity in it makes no probability."""
        return bool(np.isfinite(self.proposal.prob).all())

    @property
    def kind(self):
        sampling, decoding = self.state.sampling, self.state.options.decoding
        return type(decoding), sampling.greedy, sampling.filtered, decoding.cfg_scale > 0, sampling.num_logprobs


class Head:
    def __init__(self, compute_logits, config, max_logits: int = MAX_LOGITS):
        self.compute_logits = compute_logits  # [R, D] -> [R, V], all ranks hold all of it
        self.config, self.vocab_size = config, config.vocab_size
        self.max_rows = max(1, max_logits // config.vocab_size)

    def run(self, hidden_TD: torch.Tensor, requests: list[HeadRequest]) -> None:
        """Sets `proposal` (and `logprobs`) of every request."""
        kinds = defaultdict(list)
        for request in requests:
            if len(request.rows):  # else no masked position is read in this step
                kinds[request.kind].append(request)
        for alike in kinds.values():
            self._run_alike(hidden_TD, alike)

    def _run_alike(self, hidden_TD: torch.Tensor, requests: list[HeadRequest]) -> None:
        device = hidden_TD.device
        decoding, _, _, guided, num_logprobs = requests[0].kind
        rows = torch.from_numpy(np.concatenate([r.rows for r in requests])).to(device)
        guide = torch.from_numpy(np.concatenate([r.guide_rows for r in requests])).to(device)  # of guided ones
        table = RowTable.of(requests, self.vocab_size, device)
        parts, logprobs = [], []
        for start in range(0, len(rows), self.max_rows):
            piece = slice(start, start + self.max_rows)
            logits_RV = self.compute_logits(hidden_TD[rows[piece]]).float()
            if guided:
                guide_RV = self.compute_logits(hidden_TD[guide[piece]]).float()
                scale_R1 = table.options["cfg_scale"][piece, None] + 1
                logits_RV = guide_RV + scale_R1 * (logits_RV - guide_RV)
            raw_RV = logits_RV.log_softmax(-1) if num_logprobs is not None else None
            proposal = decoding.propose(logits_RV, self._rows(table, piece, requests[0]))
            # One transfer for all three; float64 holds every token id exactly.
            parts.append(torch.stack([proposal.token.double(), proposal.score.double(), proposal.prob.double()]))
            if num_logprobs is not None:
                logprobs += _logprobs(raw_RV, proposal.token, num_logprobs)
        token, score, prob = torch.cat(parts, 1).cpu().numpy()
        token = token.astype(np.int64)
        start = 0
        for request in requests:
            own = slice(start, start := start + len(request.rows))
            request.proposal = Proposal(token[own], score[own], prob[own])
            request.logprobs = logprobs[own] if num_logprobs is not None else None

    def _rows(self, table: "RowTable", piece: slice, like: HeadRequest) -> LogitRows:
        keys_R = table.keys[piece]
        return LogitRows(
            temperature=table.temperature[piece],
            top_p=table.top_p[piece],
            top_k=table.top_k[piece],
            options={field: column[piece] for field, column in table.options.items()},
            eos_id=self.config.eos_token_id,
            eot_id=self.config.eot_token_id,
            mask_id=self.config.mask_token_id,
            sampled=not like.state.sampling.greedy,
            filtered=like.state.sampling.filtered,
            exponential=lambda: noise.exponential(keys_R, self.vocab_size),
            uniform=lambda: noise.uniform(keys_R),
        )


@dataclass
class RowTable:
    """Parameters of each candidate row, [R] each."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    options: dict[str, torch.Tensor]
    keys: torch.Tensor

    @classmethod
    def of(cls, requests: list[HeadRequest], vocab_size: int, device: torch.device) -> "RowTable":
        counts = [len(request.rows) for request in requests]
        states = [request.state for request in requests]

        def column(values: list, dtype) -> torch.Tensor:
            return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), counts)).to(device)

        keys = [
            noise.row_keys(s.sampling.seed, s.canvas.block, s.canvas.block_step, torch.from_numpy(r.positions))
            for s, r in zip(states, requests, strict=True)
        ]
        options = {}
        for each in fields(states[0].options.decoding):
            values = [getattr(s.options.decoding, each.name) for s in states]
            if all(isinstance(value, bool) for value in values):
                options[each.name] = column(values, np.bool_)
            elif all(isinstance(value, int | float | None) for value in values):
                options[each.name] = column(values, np.float32)  # None becomes NaN
        return cls(
            temperature=column([s.sampling.temperature for s in states], np.float32),
            top_p=column([s.sampling.top_p for s in states], np.float32),
            top_k=column([s.sampling.top_k or vocab_size for s in states], np.int64),
            options=options,
            keys=torch.cat(keys).to(device),
        )


def _logprobs(logprobs_RV: torch.Tensor, token_R: torch.Tensor, count: int) -> list[Logprobs]:
    own_R1 = logprobs_RV.gather(1, token_R[:, None])
    rank_R = (logprobs_RV > own_R1).sum(-1) + 1
    value_RN, token_RN = logprobs_RV.topk(min(count, logprobs_RV.shape[1]) if count >= 0 else logprobs_RV.shape[1])
    token_ids = torch.cat([token_R[:, None], token_RN], 1).cpu().numpy()
    values = torch.cat([own_R1, value_RN], 1).cpu().numpy()
    return [Logprobs(*row) for row in zip(token_ids, values, rank_R.tolist(), strict=True)]
