"""Statistics of each physical page's keys."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

#: spread of a page's keys around their mean: "l2" and "rms" are one number (root of the summed or of the mean channel
#: variance), "vector" is the standard deviation of each channel, "diag2" the mean variance of each channel quarter
StdKind = Literal["l2", "rms", "vector", "diag2"]
STD_KINDS: tuple[str, ...] = get_args(StdKind)
#: channel groups of "diag2"
GROUPS = 4
#: spread of a page without statistics; such a page is always read
INVALID = float("inf")


@dataclass
class PageStatistics:
    """Statistics of one layer. n: nodes per page, 1 if a page is described as a whole."""

    mean: torch.Tensor  # [pages, Hkv, n, D] in the keys' dtype
    spread: torch.Tensor  # [pages, Hkv, n, W] float32; W: 1 for l2 and rms, D for vector, GROUPS for diag2
    page_size: int
    std_kind: str

    @classmethod
    def empty(cls, cache: torch.Tensor, page_size: int, std_kind: str, nodes: int = 1) -> "PageStatistics":
        """Statistics for a cache [blocks, Hkv, block_size, 2 * D], with every page invalid."""
        blocks, kv_heads, block_size, both = cache.shape
        count, dim = blocks * (block_size // page_size), both // 2
        mean = torch.zeros(count, kv_heads, nodes, dim, dtype=cache.dtype, device=cache.device)
        width = spread_width(std_kind, dim)
        spread = torch.full((count, kv_heads, nodes, width), INVALID, dtype=torch.float32, device=cache.device)
        return cls(mean, spread, page_size, std_kind)


def spread_width(std_kind: str, dim: int) -> int:
    return {"l2": 1, "rms": 1, "vector": dim, "diag2": GROUPS}[std_kind]


def spread_of(variance: torch.Tensor, std_kind: str) -> torch.Tensor:
    """Channel variances [..., D] -> [..., W]"""
    if std_kind == "vector":
        return variance.sqrt()
    if std_kind == "diag2":
        return torch.stack([part.mean(-1) for part in variance.tensor_split(GROUPS, -1)], -1)
    total = variance.sum(-1, keepdim=True)
    return (total if std_kind == "l2" else total / variance.shape[-1]).sqrt()
