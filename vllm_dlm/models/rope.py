"""Rotary embedding with the precision of each reference.

LLaDA rotates in float32 whatever the model's dtype (rope_full_precision);
Dream casts cosine and sine to the model's dtype first. vLLM's own layer does
the latter only, which is why this exists.
"""

import torch
from torch import nn


class RotaryTable(nn.Module):
    """Cosines and sines of every position, looked up once per step for all layers."""

    def __init__(self, head_dim: int, theta: float, max_positions: int, dtype: torch.dtype):
        super().__init__()
        # The references compute the table in float32 from integer exponents.
        inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.outer(torch.arange(max_positions, dtype=torch.float32), inv_freq)  # [max, D/2]
        self.register_buffer("table", torch.cat([angle.cos(), angle.sin()], -1).to(dtype), persistent=False)

    def forward(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> cos, sin [T, 1, D/2]"""
        cos, sin = self.table[positions_T].unsqueeze(1).chunk(2, -1)
        return cos, sin
