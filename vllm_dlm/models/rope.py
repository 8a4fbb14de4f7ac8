"""Rotary embedding with the precision of each reference.

LLaDA rotates in float32 for any model dtype (rope_full_precision). Dream
casts cosine and sine to the model's dtype first. This module exists because
vLLM's layer only does the latter.
"""

import torch
from torch import nn


class RotaryTable(nn.Module):
    """Cosines and sines of all positions, looked up once per step for all layers."""

    def __init__(
        self, head_dim: int, theta: float, max_positions: int, dtype: torch.dtype, rotary_dim: int | None = None
    ):
        """`rotary_dim`: number of channels that are rotated. Channels are in the order of `halves`."""
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        # The references compute the table in float32 from integer exponents.
        inv_freq = 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
        inv_freq = torch.cat([inv_freq, torch.zeros((head_dim - rotary_dim) // 2)])  # frequency 0: not rotated
        angle = torch.outer(torch.arange(max_positions, dtype=torch.float32), inv_freq)  # [max, D/2]
        self.register_buffer("table", torch.cat([angle.cos(), angle.sin()], -1).to(dtype), persistent=False)

    def forward(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> cos, sin [T, 1, D/2]"""
        cos, sin = self.table[positions_T].unsqueeze(1).chunk(2, -1)
        return cos, sin


def halves(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Channel order [D] that places the two channels of each pair half a head apart. In the checkpoint, the rotated
    channels come first, with pairs `rotary_dim` / 2 apart, and the channels that are not rotated follow."""
    turned, rest = torch.arange(rotary_dim), torch.arange(rotary_dim, head_dim)
    half, middle = rotary_dim // 2, len(rest) // 2
    return torch.cat([turned[:half], rest[:middle], turned[half:], rest[middle:]])
