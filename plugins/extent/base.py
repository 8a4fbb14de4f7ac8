"""What every extent shares: which positions of a canvas have a row while a block is decoded.

Rows are the first so many positions of the canvas; the last of them may stand
for another position, farther behind. To all else (plans, caches, attention,
selections) the canvas is as long as it has rows. It grows when a block is
opened: rows come in that nobody has seen, so that block begins as a canvas
does, with nothing cached.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Extent:
    """What says nothing else has a row for every position: the exact canvas."""

    name: ClassVar[str | None] = None
    #: field values published for a model and task, chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: a canvas costs what it has rows for, so its length is a bound and may be left open
    grows: ClassVar[bool] = False

    def rows(self, end: int, length: int) -> int:
        """How many rows there are of a canvas of `length` positions, while a block is decoded that ends before
        `end`; at least so many. They get no fewer from block to block."""
        return length

    def last(self, end: int, length: int) -> int:
        """The position that the last row stands for."""
        return self.rows(end, length) - 1
