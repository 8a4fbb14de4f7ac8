"""What every reuse policy shares."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Reuse:
    name: ClassVar[str | None] = None
