"""dLLM-Cache: recomputes the prompt at long intervals, and the response where its values changed most.

https://arxiv.org/abs/2506.06295. At step s (from 1) the prompt is refreshed
when (s-1) % Kp == 0 and the response when (s-1) % Kr == 0. In between, every
response row gets a new value vector. The share rho of rows whose values are
least similar to the cached ones is recomputed. The other rows keep their last
attention and FFN outputs. The first layer always recomputes the whole response,
so that a newly committed token takes effect. The official code has this rule,
the paper does not mention it.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.reuse.base import Progress, Reuse, RowShape, StepPlan, span
from vllm_dlm.plugins.reuse.flow import (
    Attend,
    FeedForward,
    Flow,
    Layer,
    Output,
    QueryKey,
    QueryKeyValue,
    Value,
    dense,
)

#: Kp / Kr of the official scripts; rho is 0.25 in all of them
PUBLISHED = {
    "llada-instruct": {
        "gsm8k": (50, 7), "bbh": (50, 6), "gpqa": (50, 6), "humaneval": (25, 5), "mbpp": (100, 5), "math": (50, 1),
        "mmlu": (100, 7), "mmlu-pro": (51, 3), "hotpotqa": (100, 8),
    },
    "llada-base": {
        "gsm8k": (25, 5), "bbh": (50, 6), "gpqa": (100, 8), "humaneval": (50, 5), "mbpp": (25, 4), "math": (50, 8),
        "mmlu": (100, 6), "mmlu-pro": (100, 6),
    },
    "dream-instruct": {
        "gsm8k": (25, 2), "bbh": (10, 2), "gpqa": (10, 8), "humaneval": (50, 1), "mbpp": (10, 8), "math": (50, 1),
        "mmlu": (100, 8), "mmlu-pro": (5, 1),
    },
    "dream-base": {
        "gsm8k": (100, 8), "bbh": (25, 4), "gpqa": (100, 8), "humaneval": (5, 1), "mbpp": (25, 8), "math": (100, 4),
        "mmlu": (100, 2), "mmlu-pro": (25, 2),
    },
}  # fmt: skip


@dataclass(frozen=True)
class DLLMCache(Reuse):
    name: ClassVar[str] = "dllm_cache"
    presets: ClassVar[dict[str, dict]] = {
        f"{model}-{task}": {"prompt_interval": prompt, "response_interval": response}
        for model, tasks in PUBLISHED.items()
        for task, (prompt, response) in tasks.items()
    }
    exact: ClassVar[dict] = {"prompt_interval": 1, "response_interval": 1}

    prompt_interval: int = 50  # Kp
    response_interval: int = 7  # Kr
    transfer_ratio: float = 0.25  # rho
    parity: bool = False  # reproduces the official code: rows of new tokens are not forced
    stagger: bool = True  # spread refreshes of different requests over the steps

    def __post_init__(self):
        check(self.prompt_interval >= 1, "prompt_interval", self.prompt_interval, "at least 1")
        check(self.response_interval >= 1, "response_interval", self.response_interval, "at least 1")
        check(0 <= self.transfer_ratio <= 1, "transfer_ratio", self.transfer_ratio, "between 0 and 1")

    def plan(self, at: Progress) -> StepPlan:
        response = at.response
        prompt_due = at.cold or at.step % self.prompt_interval == 0
        response_due = at.cold or at.step % self.response_interval == 0
        # Only prompt rows would use the prompt rows' outputs, so they are live only in steps that refresh them.
        live = span(0 if prompt_due else response[0], at.length)
        if response_due:
            return StepPlan.dense(live, refresh=True)
        # With Dream, the head reads the prompt row before the response, so this row is always recomputed.
        forced = span(0 if prompt_due else response[0], at.prompt_len)
        budget = int(self.transfer_ratio * (at.length - at.prompt_len))
        return StepPlan(live, forced, budget, len(forced) + budget, refresh=prompt_due, force_changed=not self.parity)

    def feature_rows(self, prompt_len: int, length: int) -> int:
        return length - prompt_len

    def feature_width(self, row: RowShape) -> int:
        return row.hidden

    @property
    def layer_key(self) -> Hashable:
        return DLLMCache, self.transfer_ratio > 0

    def layer(self, at: Layer) -> Flow:
        return dense(at, kept) if at.whole else self._partial(at)

    def _partial(self, at: Layer) -> Flow:
        """Every row gets a new value. Rows whose values changed most are recomputed, the others add their cached
        outputs."""
        # The first layer recomputes every row. With rho = 0 the other layers recompute only forced rows.
        if at.index > 0 and self.transfer_ratio > 0 and len(at.forced) < len(at.all):
            before = at.cached_values(at.all)
            v = yield Value(at.h, at.all)
            rows = at.least_similar(at.similarity(v, before))
            x, h = at.inputs(rows)
            q, _ = yield QueryKey(h, rows)
        else:
            rows = at.all if at.index == 0 else at.forced
            x, h = at.inputs(rows)
            q, _, _ = yield QueryKeyValue(h, rows)
        context = yield Attend(q, rows)
        output = yield Output(context)
        _, ffn = yield FeedForward(x, output)
        new = kept(context, output, ffn)
        at.keep(rows, new)
        if rows.index is None:
            return at.all, at.x, new
        # Prompt rows keep no features, but they are always recomputed when they are live.
        added = at.features(at.all)
        return at.all, at.x, added if at.all_keep else rows.set(added, new)


def kept(context: torch.Tensor, output: torch.Tensor, ffn: torch.Tensor) -> torch.Tensor:
    """Features of a row: the sum of attention and FFN output [n, E], since both are always recomputed together"""
    return output + ffn
