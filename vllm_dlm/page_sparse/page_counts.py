"""What sparse decoding read, and what dense decoding would have read: the proof that it was active."""

from dataclasses import asdict, dataclass, fields


@dataclass
class PageCounts:
    """Summed over generated positions and over the layers that choose; a page counts once for all its heads."""

    sparse_rows: int = 0
    dense_rows: int = 0
    pages_read: int = 0
    pages_seen: int = 0

    def add(self, other: "PageCounts", times: int = 1) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        counted = asdict(self)
        for name in counted:
            setattr(self, name, 0)
        return counted
