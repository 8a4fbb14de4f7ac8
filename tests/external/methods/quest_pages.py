"""Quest (https://arxiv.org/abs/2406.10774): a page promises the most that any key between the minimum and the maximum
of its keys, channel by channel, could score."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.selection.pages import PageSelection


@dataclass(frozen=True)
class Quest(PageSelection):
    name: ClassVar[str] = "quest"

    def describe(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys.amin(2), keys.amax(2)

    def score(self, q: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return q.clamp_max(0) @ first.mT + q.clamp_min(0) @ second.mT
