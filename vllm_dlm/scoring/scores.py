"""Scoring methods, their forwards, and the sums of their log-probabilities."""

import math
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from vllm import SamplingParams

from vllm_dlm.options.scored import SCORE
from vllm_dlm.options.types import OptionError
from vllm_dlm.scoring.monte_carlo import draws

#: fields that only one method reads
OF_METHOD = {"mc_num": "monte_carlo", "batch_size": "monte_carlo", "seed": "monte_carlo", "steps": "blocks"}
#: log-probability that represents minus infinity, which JSON cannot express; the same as in vLLM's completions
LOWEST = -9999.0


class How(BaseModel):
    """Fields of a request for scores, except its texts. `mc_num` is bounded by `limits.score_draws`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Literal["monte_carlo", "blocks"] | None = None  # None: see `resolved`
    mc_num: int = Field(128, ge=1)  # number of draws; name and default are LLaDA's
    batch_size: int | None = Field(None, ge=1)  # draws whose mask counts are spread; None: 16, or mc_num
    seed: int | None = Field(None, ge=0, lt=1 << 63)  # None: random
    steps: int = Field(
        1, ge=1, le=1 << 20
    )  # steps of the continuation, or of each canvas block of a block-causal model
    cfg_scale: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)  # classifier-free guidance
    priority: int = Field(0, ge=-(1 << 63), lt=1 << 63)  # priority of each forward, as in vLLM's completions


@dataclass(frozen=True)
class Method:
    """A scoring method with all of its values."""

    name: str
    mc_num: int = 1  # maximum number of forwards per pair
    batch_size: int = 0
    seed: int | None = None
    steps: int = 1
    cfg_scale: float = 0.0


def resolved(how: How, attention: str) -> Method:
    """The method of a request, with defaults. Block-causal models only support `blocks`. For other models, a field that
    only one method reads selects that method."""
    given = [field for field in OF_METHOD if field in how.model_fields_set]
    usual = "monte_carlo" if attention == "full" else "blocks"
    name: str = how.method or (OF_METHOD[given[0]] if given else usual)
    for field in given:
        if OF_METHOD[field] != name:
            value = getattr(how, field)
            raise OptionError(
                field, f"{field}: {value} is not supported by method {name!r}, only by {OF_METHOD[field]!r}"
            )
    if name == "blocks":
        return Method(name, steps=how.steps, cfg_scale=how.cfg_scale)
    if attention != "full":
        why = "is not supported: this model is block-causal, so the method must be 'blocks'"
        raise OptionError("method", f"method: 'monte_carlo' {why}")
    batch_size = min(16, how.mc_num) if how.batch_size is None else how.batch_size
    if how.mc_num % batch_size:
        raise OptionError("mc_num", f"mc_num: {how.mc_num} must be a multiple of batch_size, {batch_size}")
    seed = secrets.randbits(62) if how.seed is None else how.seed
    return Method(name, how.mc_num, batch_size, seed, cfg_scale=how.cfg_scale)


@dataclass(frozen=True)
class Pair:
    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Score:
    logprob: float  # natural logarithm
    num_tokens: int
    is_greedy: bool  # each token was the most probable one in every forward that scored it
    token_ids: list[int]
    token_logprobs: list[float] | None  # None for monte_carlo
    method: str
    seed: int | None = None  # seed of the draws


@dataclass(frozen=True)
class Forward:
    """One request of the engine."""

    masked: tuple[int, ...] | None = None  # None: all of the continuation
    mask: bytes = b""  # digest of `masked`

    def params(self, pair: Pair, method: Method) -> SamplingParams:
        score = {"start": len(pair.context), "answer": pair.continuation}
        steps = min(method.steps, len(pair.continuation))  # at least one token per step
        if self.masked is not None:
            score["masked"] = list(self.masked)
        return SamplingParams(
            temperature=0,
            max_tokens=len(pair.continuation),
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={SCORE: score, "dlm_steps": steps, "dlm_cfg_scale": method.cfg_scale},
            skip_clone=True,  # made for one request
        )


class PairScore:
    """A pair that is being scored: its forwards, created on demand, and the sums of their log-probabilities.

    Equal draws are computed once. Only a digest and one number are kept of a draw.
    """

    def __init__(self, pair: Pair, method: Method):
        self.pair, self.method = pair, method
        self.counts: Counter[bytes] = Counter()  # number of draws, by digest of their mask
        self.terms: dict[bytes, float] = {}  # term of one draw with that mask
        self.is_greedy = True
        self.token_logprobs: list[float] | None = None

    def forwards(self) -> Iterator[Forward]:
        if self.method.name == "blocks":
            self.counts[b""] = 1
            yield Forward()
            return
        assert self.method.seed is not None
        length = len(self.pair.continuation)
        for masked in draws(length, self.method.mc_num, self.method.batch_size, self.method.seed):
            mask = blake2b(masked.tobytes(), digest_size=16).digest()
            self.counts[mask] += 1
            if self.counts[mask] == 1:
                yield Forward(tuple(masked.tolist()), mask)

    def add(self, forward: Forward, logprobs: Sequence) -> None:
        """`logprobs`: for each position, token -> vLLM's Logprob"""
        tokens = self.pair.continuation
        where = range(len(tokens)) if forward.masked is None else forward.masked
        found = [logprobs[index][tokens[index]] for index in where]
        values = [max(each.logprob, LOWEST) for each in found]
        self.is_greedy &= all(each.rank == 1 for each in found)
        self.terms[forward.mask] = sum(values) * len(tokens) / len(values)
        if forward.masked is None:
            self.token_logprobs = values

    def score(self) -> Score:
        # fsum: independent of the order in which forwards end
        total = math.fsum(self.counts[mask] * term for mask, term in self.terms.items())
        return Score(
            logprob=total / self.method.mc_num if self.token_logprobs is None else sum(self.token_logprobs),
            num_tokens=len(self.pair.continuation),
            is_greedy=self.is_greedy,
            token_ids=self.pair.continuation,
            token_logprobs=self.token_logprobs,
            method=self.method.name,
            seed=self.method.seed,
        )


Job = tuple[PairScore, Forward, SamplingParams]


def jobs(scores: Sequence[PairScore]) -> Iterator[Job]:
    """The forwards of all pairs, created on demand."""
    for score in scores:
        for forward in score.forwards():
            yield score, forward, forward.params(score.pair, score.method)
