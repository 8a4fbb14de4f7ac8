"""What every selection of cached keys shares."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Selection:
    name: ClassVar[str | None] = None
    #: also decodes autoregressive models (see vllm_dlm/attention)
    autoregressive: ClassVar[bool] = False
