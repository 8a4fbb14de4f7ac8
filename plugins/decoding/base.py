"""Base class of decodings: canvas blocks, quotas, and the choice of the proposed tokens to commit.

A denoising step has a device half and a host half. `propose` turns the
logits of all rows of all requests that use one algorithm into one token,
one score and one probability per row. `choose` then picks, per request and
on the host, the positions to fill. Only tensors of size [rows] go to the host.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from vllm_dlm.shown import shown


@dataclass
class LogitRows:
    """Parameters of each logits row for `propose`; R rows of several requests."""

    temperature: torch.Tensor  # [R] float32, 0 = greedy
    top_p: torch.Tensor  # [R] float32, 1 = off
    top_k: torch.Tensor  # [R] int64, vocabulary size = off
    #: numeric and boolean fields of the decoding, by name: [R] bool, or float32 with NaN for None
    options: dict[str, torch.Tensor]
    eos_id: int
    eot_id: int | None
    mask_id: int
    sampled: bool  # any row has a temperature
    filtered: bool  # any row has top_p or top_k
    exponential: Callable[[], torch.Tensor]  # draws Exp(1) noise [R, V], float64
    uniform: Callable[[], torch.Tensor]  # draws uniform noise [R], float32
    #: columns of the decoding's `Memory`, by name: [R, …]
    memory: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Proposal:
    """One proposed token per row. As tensors from `propose`, as numpy arrays in `choose`."""

    token: torch.Tensor  # [R] int64
    score: torch.Tensor  # [R] float32: ranks the positions
    prob: torch.Tensor  # [R] float32: probability of the token, compared with thresholds
    noted: torch.Tensor | None = None  # [Memory.noted, R] float64: for the decoding's `Memory`


class Memory:
    """State of a decoding, on the host, for the masks of one canvas block. Each start of a block creates a new one,
    including a restart after a preemption."""

    #: number of values per row that `propose` notes for the next steps
    noted: ClassVar[int] = 0

    def columns(self, positions: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Input of `propose` for each of these positions, which hold `tokens`: [C, …], of any width. Batches pad it
        with -1 (integers) or 0."""
        return {}

    def note(self, positions: np.ndarray, noted: np.ndarray) -> None:
        """Takes the values that `propose` noted for the positions: [Memory.noted, C]"""


#: creates a step's random generator; called only if needed, since that takes longer than most decodings' host work
Random = Callable[[], np.random.Generator]


class Turn(NamedTuple):
    """One step in the schedule of a canvas block."""

    step: int  # forwards of the block so far
    steps: int  # how many are scheduled
    quota: int  # positions that the schedule fills in this step: between 1 and the number of candidates
    positions: np.ndarray  # [C] positions of the candidates in the canvas, ascending
    masked: float = 1.0  # r: masks from the start of the block to the last row, as a share of these rows
    pressure: float = 0.0  # share of the server's requests that are waiting
    held: np.ndarray | None = None  # [C] bool: candidates that hold a token, see EditingDecoding
    tokens: np.ndarray | None = None  # [C] tokens that the candidates hold
    prompt_len: int | None = None  # candidates below this position are masks of the prompt

    @property
    def last(self) -> bool:
        return self.step >= self.steps - 1

    @property
    def in_response(self) -> np.ndarray:
        """Indices of the candidates in the response"""
        return np.flatnonzero(self.positions >= self.prompt_len) if self.prompt_len is not None else np.arange(0)


@dataclass(frozen=True)
class Schedule:
    """Canvas blocks, and how many positions each step of a block fills."""

    steps: int | None = None  # denoising steps for the whole canvas; None: one token per step
    block_length: int | None = None  # None: the whole canvas is one block

    def __post_init__(self):
        for name in ("steps", "block_length"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "a whole number of at least 1")

    def blocks(self, length: int) -> list[tuple[int, int]]:
        """[start, end) of each canvas block of a response. The references require that the block length divides the
        response; here the last block may be shorter."""
        width = self.block_length or length
        return [(start, min(start + width, length)) for start in range(0, length, width)]

    def scheduled(self, candidates: np.ndarray, prompt_len: int) -> int:
        """Number of masks that the schedule of a block counts. LLaDA's does not count masks in the prompt, although
        they compete for the quota."""
        return int((candidates >= prompt_len).sum())

    def block_steps(self, block: int, num_blocks: int, masks: int) -> int:
        """Steps spent on one block: the request's steps are split evenly, and the first blocks get the remainder. 0 if
        the request has too few steps."""
        if self.steps is None:
            return max(masks, 1)
        return self.steps // num_blocks + (block < self.steps % num_blocks)

    def quotas(self, masks: int, steps: int) -> list[int]:
        """Number of positions that each step fills. LLaDA's schedule: an even split, the remainder first.

        The reference continues with forwards that fill nothing once the masks run out; these are skipped."""
        share, rest = divmod(masks, steps)
        return [share + 1] * rest + [share] * (steps - rest if share else 0)

    def most_steps(self, masks: int, scheduled: int) -> int:
        """Maximum forwards of a block with `masks` masks: after the scheduled steps each step fills at least one
        position, and one step may have nothing to fill. More forwards are an error."""
        return masks + scheduled + 1


@dataclass(frozen=True)
class Threshold:
    """Fast-dLLM's rules, which fill positions by probability instead of by quota."""

    threshold: float | None = None  # positions with at least this probability are filled
    threshold_decay: float = 0.0  # alpha of Streaming-dLLM: the threshold falls by up to this share as masks are filled
    threshold_floor: float | None = None  # lowest threshold while other requests wait; None: `threshold`
    factor: float | None = None  # the n-th best is filled while (n+1)(1-p_n) < factor

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc]
        check(self.threshold is None or 0 <= self.threshold <= 1, "threshold", self.threshold, "between 0 and 1")
        decay = self.threshold_decay
        check(0 <= decay <= 1, "threshold_decay", decay, "between 0 and 1")
        check(not decay or self.threshold is not None, "threshold_decay", decay, "0 without a threshold")
        floor, most = self.threshold_floor, self.threshold
        within = floor is None or (most is not None and 0 <= floor <= most)
        check(
            within, "threshold_floor", floor, "unset without a threshold" if most is None else f"between 0 and {most}"
        )
        check(self.factor is None or self.factor > 0, "factor", self.factor, "greater than 0")

    @property
    def thresholded(self) -> bool:
        return self.threshold is not None or self.factor is not None

    def limit(self, turn: Turn) -> float:
        """The threshold of a step. It is lower while requests wait and, after a block's first step, falls as masks are
        filled."""
        assert self.threshold is not None
        floor = self.threshold if self.threshold_floor is None else self.threshold_floor
        threshold = self.threshold - turn.pressure * (self.threshold - floor)
        return threshold * (1 - self.threshold_decay * (1 - turn.masked) * (turn.step > 0))

    def probable(self, prob: np.ndarray, turn: Turn) -> np.ndarray:
        """Indices of the positions that the threshold or the factor rule fills"""
        order = best(prob, len(prob))
        ranked = prob[order]
        if self.factor is None:
            keep = ranked >= self.limit(turn)
            keep[0] = True  # the most probable position is always filled, so that each step makes progress
            return order[keep]
        # Fast-dLLM's factor rule: the n-th best needs p_n >= 1 - factor / (n + 1); walk until one fails.
        n = np.arange(1, len(ranked) + 1)
        failed = np.flatnonzero(ranked < 1 - self.factor / (n + 1))
        failed = failed[failed > 0]
        count = int(failed[0]) if len(failed) else len(ranked)
        # Its reference takes the last candidate even when that one alone failed.
        return order[: len(ranked) if count == len(ranked) - 1 else count]

    def or_probable(self, chosen: np.ndarray, prob: np.ndarray, turn: Turn) -> np.ndarray:
        """`chosen` by another rule, plus the positions that the threshold or the factor rule fills"""
        return np.union1d(chosen, self.probable(prob, turn)) if self.thresholded else chosen


@dataclass(frozen=True)
class Decoding(Threshold, Schedule):
    """Base class. Fields are options of the server or, as `dlm_<field>`, of a request. roles.py has base classes for
    decodings that do more than fill masks."""

    name: ClassVar[str | None] = None

    cfg_scale: float = 0.0  # classifier-free guidance against the canvas with the prompt masked
    suppress_eos: bool = False  # LLaDA's logits_eos_inf

    def __post_init__(self):
        super().__post_init__()
        # above any useful value, and guided logits stay finite
        check(0 <= self.cfg_scale <= 1e6, "cfg_scale", self.cfg_scale, "between 0 and 1e6")
        if self.threshold is not None:
            check(self.factor is None, "factor", self.factor, "unset when threshold is set")

    def filters(self, top_p: float, top_k: int) -> tuple[float, int]:
        """(top_p, top_k) for a request with these sampling parameters; top_k 0: off"""
        return top_p, top_k

    def starting_tokens(self, length: int, mask_id: int) -> np.ndarray | None:
        """[length] tokens of a new response; None: masks"""
        return None

    def memory(self) -> Memory | None:
        """State that is kept between the steps of one canvas block"""
        return None

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        """Token, score and probability of each row. `logits_RV` is float32 and may be overwritten. On a GPU, shapes may
        depend on the shapes of the inputs only, not on their values."""
        raise NotImplementedError

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        """Indices (into the candidates, ascending positions) to fill now"""
        if self.thresholded:
            return self.probable(proposal.prob, turn)
        chosen = best(proposal.score, turn.quota)
        # With masks in the prompt, LLaDA's reference can run out of quota and return masks inside the response. Here
        # the last step of a block fills all remaining masks of the response.
        return np.union1d(chosen, turn.in_response) if turn.last else chosen


def most_likely(score_RV: torch.Tensor, mask_id: int) -> torch.Tensor:
    """[R] the token with the highest score, except the mask token. The references may "fill" a position with a mask and
    return it; here such a position would stay masked forever. `score_RV` is unchanged on return."""
    of_mask_R = score_RV.select(1, mask_id)
    kept_R = of_mask_R.clone()
    of_mask_R.fill_(-torch.inf)
    token_R = score_RV.argmax(-1)
    of_mask_R.copy_(kept_R)
    return token_R


def rule_out(token: int, logits_RV: torch.Tensor, marked_R: torch.Tensor) -> None:
    """Sets the logit of `token` to -inf in the marked rows, in place. logits[marked, token] = … would make the host
    wait for the number of marked rows."""
    logits_RV.select(1, token).masked_fill_(marked_R, -torch.inf)


def at_token(values_RV: torch.Tensor, token_R: torch.Tensor) -> torch.Tensor:
    """[R] the value at each row's token"""
    return values_RV.gather(1, token_R.unsqueeze(1)).squeeze(1)


def filter_top_p_top_k(logits_RV: torch.Tensor, rows: LogitRows) -> None:
    """Applies top-p, then top-k to the remaining tokens, in place and in Dream's order. Dropped logits become the
    dtype's lowest value. The best token other than the mask is always kept."""
    sorted_RV, index_RV = logits_RV.sort(-1, descending=True)
    before_RV = sorted_RV.softmax(-1)
    before_RV = before_RV.cumsum(-1) - before_RV  # probability mass before each token
    rank_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    drop_RV = (before_RV > rows.top_p.unsqueeze(1)) | (rank_V >= rows.top_k.unsqueeze(1))
    drop_RV.select(1, 0).fill_(False)
    drop_RV.select(1, 1).logical_and_(index_RV.select(1, 0) != rows.mask_id)
    sorted_RV.masked_fill_(drop_RV, torch.finfo(logits_RV.dtype).min)
    logits_RV.scatter_(1, index_RV, sorted_RV)


def required(default: Any) -> Any:
    """Default of an option that its method requires. A request that chooses the method gets this value even if the
    server leaves the option unset."""
    return field(default=default, metadata={"required": True})


def check(ok: bool, field: str, value, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{field}: {shown(value)} is not valid, it must be {wanted}")


def best(score: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, ties to the lowest index."""
    if count < 0:  # as the end of a slice it would select all but the last ones
        raise ValueError(f"count: {count} is not valid, it must be at least 0")
    return np.argsort(-score, kind="stable")[:count]
