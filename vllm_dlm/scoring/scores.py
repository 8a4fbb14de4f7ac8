"""How a continuation is scored, which forwards that takes, and what their log-probabilities add up to."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from vllm import SamplingParams

from vllm_dlm.option_types import OptionError
from vllm_dlm.scoring.monte_carlo import draws
from vllm_dlm.scoring.scored import SCORE

#: fields that one method alone reads
OF_METHOD = {"mc_num": "monte_carlo", "batch_size": "monte_carlo", "seed": "monte_carlo", "steps": "blocks"}
#: draws of one continuation, at most: their masks are drawn in the front-end
MOST_DRAWS = 1 << 14


class How(BaseModel):
    """What a request for scores may say beside the texts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Literal["monte_carlo", "blocks"] | None = None  # None: see `resolved`
    mc_num: int = Field(128, ge=1, le=MOST_DRAWS)  # draws, LLaDA's name and default
    batch_size: int | None = Field(None, ge=1)  # of draws whose masks are spread evenly; None: 16, or all if fewer
    seed: int | None = Field(None, ge=0, lt=1 << 63)  # None: another one each time
    steps: int = Field(1, ge=1, le=1 << 20)  # of the continuation, or of each block of a model that knows blocks
    cfg_scale: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)  # classifier-free guidance


@dataclass(frozen=True)
class Method:
    """All of it decided."""

    name: str
    mc_num: int = 0
    batch_size: int = 0
    seed: int = 0
    steps: int = 1
    cfg_scale: float = 0.0


def resolved(how: How, attention: str) -> Method:
    """What is done of that with a model of that attention, or an error. Of models that know blocks those are the one
    exact statement; of the others a field that one method alone has says which is meant."""
    given = [field for field in OF_METHOD if field in how.model_fields_set]
    usual = "monte_carlo" if attention == "full" else "blocks"
    name: str = how.method or (OF_METHOD[given[0]] if given else usual)
    for field in given:
        if OF_METHOD[field] != name:
            value = getattr(how, field)
            raise OptionError(field, f"{field}: {value} goes with method {OF_METHOD[field]!r}, and this is {name!r}")
    if name == "blocks":
        return Method(name, steps=how.steps, cfg_scale=how.cfg_scale)
    if attention != "full":
        why = "bounds the likelihood of models that see the whole canvas, and this one reads block by block"
        raise OptionError("method", f"method: 'monte_carlo' {why}; 'blocks' scores it")
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
class Forward:
    """One request of the engine."""

    masked: tuple[int, ...] | None = None  # None: all of the continuation
    count: int = 1  # in how many draws

    def params(self, pair: Pair, method: Method) -> SamplingParams:
        score = {"start": len(pair.context), "answer": pair.continuation}
        steps = min(method.steps, len(pair.continuation))  # no step without a token
        if self.masked is not None:
            score["masked"] = list(self.masked)
        return SamplingParams(
            temperature=0,
            max_tokens=len(pair.continuation),
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={SCORE: score, "dlm_steps": steps, "dlm_cfg_scale": method.cfg_scale},
        )


def forwards(pair: Pair, method: Method) -> Iterator[Forward]:
    if method.name == "blocks":
        yield Forward()
        return
    drawn = draws(len(pair.continuation), method.mc_num, method.batch_size, method.seed)
    yield from (Forward(masked, count) for masked, count in drawn.items())


@dataclass(frozen=True)
class Read:
    """What came back for the tokens that were masked."""

    forward: Forward
    logprobs: list[float]
    best: bool  # each is the most probable token where it was scored

    @classmethod
    def of(cls, forward: Forward, pair: Pair, logprobs: Sequence) -> "Read":
        """`logprobs`: vLLM's, token -> Logprob of each position"""
        where = range(len(pair.continuation)) if forward.masked is None else forward.masked
        found = [logprobs[index][pair.continuation[index]] for index in where]
        return cls(forward, [each.logprob for each in found], all(each.rank == 1 for each in found))


@dataclass(frozen=True)
class Score:
    logprob: float  # natural logarithm
    num_tokens: int
    is_greedy: bool  # each token was the most probable one wherever it was scored
    token_ids: list[int]
    token_logprobs: list[float] | None  # of Monte Carlo there are none
    method: str
    seed: int | None = None  # of the draws

    @classmethod
    def of(cls, pair: Pair, method: Method, reads: Sequence[Read]) -> "Score":
        length, greedy = len(pair.continuation), all(read.best for read in reads)
        scored = cls(0.0, length, greedy, pair.continuation, None, method.name)
        if method.name == "blocks":
            (read,) = reads
            return replace(scored, logprob=sum(read.logprobs), token_logprobs=read.logprobs)
        # in one order, whichever came back first
        ordered = sorted(reads, key=lambda read: read.forward.masked or ())
        total = sum(read.forward.count * sum(read.logprobs) * length / len(read.logprobs) for read in ordered)
        return replace(scored, logprob=total / method.mc_num, seed=method.seed)
