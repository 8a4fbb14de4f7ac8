"""Dream's entropy order: the positions whose distribution has the lowest entropy are committed first.

https://arxiv.org/abs/2508.15487, generation_utils.py of HKUNLP/Dream. Also the
base class of Dream's other algorithms, which differ only in the score.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.kernels.head_statistics import head_statistics
from vllm_dlm.plugins.decoding.base import (
    Decoding,
    LogitRows,
    Proposal,
    Random,
    Turn,
    at_token,
    check,
    filter_top_p_top_k,
    most_likely,
    rule_out,
)


@dataclass(frozen=True)
class Entropy(Decoding):
    name: ClassVar[str] = "entropy"
    #: field of head_statistics that equals `score`; None if a class defines another score
    statistic: ClassVar[str | None] = "entropy"

    eps: float = 1e-3  # end of the time schedule
    algorithm_temperature: float = 0.0  # alg_temp: above 0, positions are drawn instead of ranked
    # vLLM turns top_p and top_k off at temperature 0. There they change no token, but Dream's confidence. None: vLLM's.
    top_p: float | None = None
    top_k: int | None = None  # 0: off

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "score" in vars(cls) and "statistic" not in vars(cls):
            cls.statistic = None

    def __post_init__(self):
        super().__post_init__()
        check(0 < self.eps < 1, "eps", self.eps, "between 0 and 1")
        check(self.algorithm_temperature >= 0, "algorithm_temperature", self.algorithm_temperature, "at least 0")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "greater than 0 and at most 1")
        check(self.top_k is None or self.top_k >= 0, "top_k", self.top_k, "at least 0")

    def filters(self, top_p: float, top_k: int) -> tuple[float, int]:
        return top_p if self.top_p is None else self.top_p, top_k if self.top_k is None else self.top_k

    def scheduled(self, candidates: np.ndarray, prompt_len: int) -> int:
        return len(candidates)  # masks in the prompt count, too

    def times(self, steps: int) -> torch.Tensor:
        return torch.linspace(1, self.eps, steps + 1)  # [steps + 1]

    def quotas(self, masks: int, steps: int) -> list[int]:
        # The linear schedule in float32 as the reference has it: with one step per token the first step
        # fills nothing and the last fills two. Steps that fill nothing need no forward.
        if self.thresholded:
            return super().quotas(masks, steps)  # Fast-dLLM splits evenly when it tests a threshold
        times, quotas, left = self.times(steps).numpy(), list[int](), masks
        for share in 1 - times[1:-1] / times[:-2]:
            quotas.append(int(np.float32(left) * share))
            left -= quotas[-1]
        return [quota for quota in [*quotas, left] if quota]

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        suppress_R = rows.options["suppress_eos"]
        if logits_RV.is_cuda and cls.statistic and not (rows.sampled or rows.filtered):
            # the same result from one kernel
            found = head_statistics(
                logits_RV, rows.mask_id, rows.eos_id, suppress_eos=suppress_R, entropy=cls.statistic == "entropy"
            )
            return Proposal(found.token, getattr(found, cls.statistic), found.prob)
        rule_out(rows.eos_id, logits_RV, suppress_R)
        greedy_R = rows.temperature == 0
        if rows.sampled:
            logits_RV /= torch.where(greedy_R, 1.0, rows.temperature).unsqueeze(1)
        if rows.filtered:
            # Dream filters before it computes the confidence, for greedy rows, too.
            filter_top_p_top_k(logits_RV, rows)
        prob_RV = logits_RV.softmax(-1)
        token_R = most_likely(prob_RV, rows.mask_id)
        if rows.sampled:
            drawn_R = most_likely(prob_RV / rows.exponential(), rows.mask_id)
            token_R = torch.where(greedy_R, token_R, drawn_R)
        prob_R = at_token(prob_RV, token_R)
        return Proposal(token_R, cls.score(prob_RV, prob_R), prob_R)

    @staticmethod
    def score(prob_RV: torch.Tensor, prob_R: torch.Tensor) -> torch.Tensor:
        return (prob_RV * (prob_RV + 1e-10).log()).sum(-1)  # negative entropy

    def choose(self, proposal: Proposal, turn: Turn, rng: Random) -> np.ndarray:
        if self.algorithm_temperature and not self.thresholded:
            # Gumbel top-k draws without replacement from softmax(score / algorithm_temperature).
            drawn = proposal.score / self.algorithm_temperature + rng().gumbel(size=proposal.score.shape)
            proposal = replace(proposal, score=drawn)
        chosen = super().choose(proposal, turn, rng)
        if self.threshold is not None and self.steps is not None:
            # Fast-dLLM's threshold for Dream keeps the step budget: no step fills more than its even share.
            chosen = chosen[: max(turn.quota, 1)]
        return chosen
