"""The probability of the token that a position holds, such as a draft or an earlier choice."""

from typing import ClassVar

import numpy as np
import torch

from vllm_dlm.kernels.head_statistics import head_statistics
from vllm_dlm.plugins.decoding.base import LogitRows, Memory, at_token, rule_out


class HeldTokens(Memory):
    noted: ClassVar[int] = 1  # the probability of the token that the position holds

    def columns(self, positions: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
        return {"held": tokens.reshape(-1, 1)}


def held_probability(logits_RV: torch.Tensor, rows: LogitRows) -> torch.Tensor:
    """[1, R] float64. The memory of the decoding must be HeldTokens. Rules out the end token where it is suppressed."""
    held_R = rows.memory["held"].squeeze(1)
    rule_out(rows.eos_id, logits_RV, rows.options["suppress_eos"])
    on_gpu = logits_RV.is_cuda
    total_R = head_statistics(logits_RV, rows.mask_id).logsumexp if on_gpu else logits_RV.logsumexp(-1)
    return (at_token(logits_RV, held_R) - total_R).exp_().double().unsqueeze(0)
