"""Streams, which a step computes, and readings, the positions of a stream whose tokens are wanted.

A stream is one version of a canvas: the canvas itself, or a stream added by a feature (the unconditional stream of
guidance, a speculative canvas, a shadow of the canvas block). A step is a batch of streams and independent of features.
Features make streams and get their readings back.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from vllm_dlm.canvas.commit import NOTHING
from vllm_dlm.canvas.selected_keys import SelectedKeys
from vllm_dlm.plugins.decoding.base import Proposal
from vllm_dlm.plugins.reuse.base import Reuse, StepPlan, span

if TYPE_CHECKING:
    from vllm_dlm.canvas.denoising import Denoising


@dataclass(frozen=True)
class Sampling:
    """The part of vLLM's SamplingParams that a denoising step needs."""

    temperature: float
    top_p: float
    top_k: int  # 0: off
    seed: int
    stop_ids: frozenset[int]  # generation ends at the first of these tokens without a mask before it
    num_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        return self.top_p < 1 or self.top_k > 0


class Logprobs(NamedTuple):
    """Log-probabilities at one position: the proposed token first, then the most probable ones."""

    token_ids: np.ndarray  # [1 + n]
    values: np.ndarray  # [1 + n]
    rank: int

    @classmethod
    def certain(cls, token: int, count: int) -> "Logprobs":
        """Record of a given token"""
        ids = np.full(1 + max(count, 0), token)
        return cls(ids, np.zeros(len(ids)), 1)


class Constraint(Protocol):
    """The tokens that are allowed at the positions of a reading."""

    def gather(self, readings: list["Reading"], width: int, upload: Any) -> Any:
        """Combines the constraints of several readings on the device, to an object with `rule_out(logits_RV, piece)`,
        which changes a slice of their logits rows in place. `width`: size of the vocabulary"""


NO_PROPOSAL = Proposal(NOTHING, np.zeros(0), np.zeros(0))


@dataclass(eq=False)
class Reading:
    """C positions of a stream whose logits are read, and the head's results."""

    state: "Denoising"
    positions: np.ndarray  # [C] positions of the canvas, ascending
    rows: np.ndarray = field(default_factory=lambda: NOTHING)  # [C] rows of the hidden states that predict them
    guide_rows: np.ndarray = field(default_factory=lambda: NOTHING)  # [C] the same rows of the unconditional stream
    constraint: Constraint | None = None  # None: any token may be at each position
    judged: bool = False  # the head scores the tokens that the positions hold instead of proposing tokens
    made_by: str = "canvas"  # name of the feature that added the stream
    others: list["Reading"] = field(default_factory=list)  # readings of the same request and step, added by features
    proposal: Proposal = field(default_factory=lambda: NO_PROPOSAL)  # numpy arrays, set by Head.read
    logprobs: list[Logprobs] | None = None
    best: np.ndarray | None = None  # [n, C] see Head.best

    def __post_init__(self):
        self.tokens = self.state.canvas.tokens[self.positions]  # [C] tokens of the canvas at the positions

    @property
    def held(self) -> np.ndarray:
        """[C] bool: positions that held a token instead of a mask"""
        return self.tokens != self.state.canvas.mask_id

    @property
    def all(self) -> list["Reading"]:
        return [self, *self.others]

    def added_by(self, feature: str) -> list["Reading"]:
        return [reading for reading in self.others if reading.made_by == feature]

    @property
    def finite(self) -> bool:
        """Whether all probabilities are finite. Logits with a NaN or an infinity give none."""
        return bool(np.isfinite(self.proposal.prob).all())

    @property
    def kind(self) -> tuple:
        """Readings of one kind are decoded together."""
        sampling, decoding = self.state.sampling, type(self.state.options.decoding)
        guided, constrained = len(self.guide_rows) > 0, self.constraint is not None
        own = sampling.greedy, sampling.filtered, sampling.num_logprobs
        return decoding, own, guided, constrained, self.judged


@dataclass
class Stream:
    """One version of a canvas in one step, N rows."""

    reuse: Reuse
    plan: StepPlan
    token_ids: np.ndarray  # [N]
    head_positions: np.ndarray  # rows whose hidden state the head needs, ascending, all live
    changed: np.ndarray  # positions whose token changed since the last forward
    response: tuple[int, int]  # rows from which the response is read
    feature_rows: int = 0  # the last `feature_rows` rows keep features of the reuse policy
    kv_table: np.ndarray | None = None  # block ids, in order
    feature_table: np.ndarray = field(default_factory=lambda: NOTHING)
    selected: SelectedKeys | None = None  # keys that the response attends to; None: all of them
    filtered: bool = False  # the selection applies even if every row is recomputed
    chooses: bool = False  # this step makes a new choice of keys
    last: int | None = None  # position that the last row represents; None: its own
    positions: np.ndarray | None = None  # [N] positions that the rows represent; None: their own
    #: shadow streams only: offset from a row to the row of the canvas that it must not attend to
    hidden_row: int | None = None
    #: [S] streams of drafts only: positions of the drafts, in the order in which they depend on each other. The last
    #: 2 * S rows are these drafts and as many masks, and the only live ones
    drafted: np.ndarray | None = None
    request: str = ""  # id of the request
    reading: Reading | None = None  # None: nothing is read at this stream
    guides: bool = False  # the unconditional stream of the canvas that has the same reading
    #: [2, n] source and destination blocks of copies that precede the step
    copies: np.ndarray | None = None

    @property
    def whole(self) -> bool:
        return self.plan.whole(len(self.token_ids))

    @property
    def cached(self) -> bool:
        return self.kv_table is not None

    @property
    def kind(self) -> tuple:
        """Streams of one kind form a group of rows."""
        # Streams of one policy may differ in having blocks: policy `none` has them only with a selection. Selected keys
        # of a group share one pool and therefore one selection.
        pool = self.selected and self.selected.pool
        return self.reuse, self.cached, self.whole, self.filtered, pool, self.hidden_row, self.drafted is not None

    @property
    def num_keys(self) -> int:
        """Number of cached keys after this step"""
        return len(self.token_ids) - (0 if self.drafted is None else 2 * len(self.drafted))

    @property
    def num_rows(self) -> int:
        return len(self.plan.live)

    @cached_property
    def forced(self) -> np.ndarray:
        """Indices of live rows that are always recomputed: those of the plan, and rows of new tokens unless the policy
        excludes them"""
        plan = self.plan
        if len(plan.forced) == len(plan.live):
            return np.arange(len(plan.live))
        forced = among(plan.live, plan.forced)
        if not plan.force_changed or not len(self.changed):
            return forced
        return np.union1d(forced, among(plan.live, self.changed))

    @property
    def leading(self) -> int:
        """Number of rows that a plan with a budget recomputes: rows of new tokens count against the budget."""
        plan = self.plan
        return min(max(len(self.forced), len(plan.forced) + (plan.budget or 0)), len(plan.live))


def plain_stream(tokens: np.ndarray, heads: np.ndarray) -> Stream:
    """A stream of the exact model without caches."""
    plan = StepPlan.dense(span(0, len(tokens)))
    return Stream(Reuse(), plan, tokens, heads, NOTHING, (0, len(tokens)))


def among(live: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Indices into `live` of the positions that it contains; both ascend."""
    if not len(positions) or not len(live):
        return NOTHING
    first, last = live[0], live[-1]
    positions = positions[(positions >= first) & (positions <= last)]
    if last - first + 1 == len(live):
        return positions - first
    place = np.searchsorted(live, positions)
    return place[live[place] == positions]


def contained(live: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[n] bool: which of the positions are among the live ones; both ascend."""
    if not len(live):
        return np.zeros(len(positions), np.bool_)
    if len(live) == live[-1] - live[0] + 1:
        return (positions >= live[0]) & (positions <= live[-1])
    return live[np.searchsorted(live, positions).clip(max=len(live) - 1)] == positions
