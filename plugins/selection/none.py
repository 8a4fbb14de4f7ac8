"""Every query reads every key: the exact model."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_dlm.plugins.selection.base import Selection


@dataclass(frozen=True)
class All(Selection):
    name: ClassVar[str] = "none"
    sparse: ClassVar[bool] = False

    def applies(self, prompt_len: int, length: int) -> bool:
        return False
