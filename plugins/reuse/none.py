"""Every row of every layer is recomputed at every step: the exact model."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.reuse.base import Reuse


@dataclass(frozen=True)
class Dense(Reuse):
    name: ClassVar[str] = "none"
    exact: ClassVar[dict] = {}
    caches: ClassVar[bool] = False

    @property
    def layer_key(self) -> Hashable:
        return Dense
