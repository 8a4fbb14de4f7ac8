"""LLaDA's low-confidence remasking: block by block, the most probable tokens are committed first.

https://arxiv.org/abs/2502.09992, generate.py of ML-GSAI/LLaDA.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.kernels.head_statistics import head_statistics
from vllm_dlm.plugins.decoding.base import (
    Decoding,
    LogitRows,
    Proposal,
    at_token,
    filter_top_p_top_k,
    most_likely,
    rule_out,
)


@dataclass(frozen=True)
class LowConfidence(Decoding):
    name: ClassVar[str] = "low_confidence"

    block_length: int | None = 32
    confidence_eos_eot_inf: bool = False  # EOS and EOT are committed last

    @classmethod
    def propose(cls, logits_RV: torch.Tensor, rows: LogitRows) -> Proposal:
        suppress_R, unlikely_R = rows.options["suppress_eos"], rows.options["confidence_eos_eot_inf"]
        if logits_RV.is_cuda and not rows.sampled:
            # the same result from one kernel
            found = head_statistics(logits_RV, rows.mask_id, rows.eos_id, rows.eot_id, suppress_R, unlikely_R)
            return Proposal(found.token, cls.score(found.prob, rows), found.prob)
        rule_out(rows.eos_id, logits_RV, suppress_R)
        noisy_RV = logits_RV
        if rows.sampled:
            # argmax of exp(l) / E^T, the reference's Gumbel-max in float64. Temperature affects only the choice of the
            # token; the confidence comes from the plain logits.
            noise_RV = rows.exponential().log_().mul_(-rows.temperature.unsqueeze(1).double())
            noisy_RV = noise_RV.add_(kept(logits_RV, rows) if rows.filtered else logits_RV)
        token_R = most_likely(noisy_RV, rows.mask_id)
        # In the reference this option sets logits to -inf after the argmax and before the softmax (only partly when
        # sampling): EOS and EOT get confidence 0, the other tokens are renormalised. Here this holds at every
        # temperature.
        for special in (rows.eos_id, rows.eot_id):
            if special is not None:
                rule_out(special, logits_RV, unlikely_R)
        prob_R = (at_token(logits_RV, token_R) - logits_RV.logsumexp(-1)).exp_()
        return Proposal(token_R, cls.score(prob_R, rows), prob_R)

    @staticmethod
    def score(prob_R: torch.Tensor, rows: LogitRows) -> torch.Tensor:
        return prob_R


def kept(logits_RV: torch.Tensor, rows: LogitRows) -> torch.Tensor:
    """Logits with the tokens outside top_p and top_k at -inf. LLaDA's reference has neither parameter. Here they have
    vLLM's meaning and, like temperature, affect only the choice of the token."""
    scaled_RV = logits_RV / torch.where(rows.temperature == 0, 1.0, rows.temperature).unsqueeze(1)
    filter_top_p_top_k(scaled_RV, rows)
    return logits_RV.masked_fill(scaled_RV == torch.finfo(scaled_RV.dtype).min, -torch.inf)
