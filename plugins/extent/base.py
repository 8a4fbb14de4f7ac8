"""Base class of extents, which decide which positions of a canvas have a row while a canvas block is decoded.

The first n positions of the canvas have a row, and the last row may represent a
later position. Everything else (plans, caches, attention, selections) treats
the number of rows as the length of the canvas. The canvas may grow when a block
is opened. The new rows have no cached state, so such a block starts cold, like a
new canvas.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Extent:
    """By default, every position has a row: the exact canvas."""

    name: ClassVar[str | None] = None
    #: field values published for a model and task, chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: the canvas starts small and grows, so its length is only an upper bound and may be omitted
    grows: ClassVar[bool] = False

    def rows(self, end: int, length: int) -> int:
        """Number of rows of a canvas of `length` positions, while the block that ends before `end` is decoded. It is at
        least `end` and never shrinks from block to block."""
        return length

    def last(self, end: int, length: int) -> int:
        """The position that the last row represents."""
        return self.rows(end, length) - 1
