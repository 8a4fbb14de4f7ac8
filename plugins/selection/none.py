"""Every query sees every key: the exact model."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.selection.base import Selection


@dataclass(frozen=True)
class All(Selection):
    name: ClassVar[str] = "none"
