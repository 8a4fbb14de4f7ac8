"""Counts of pages that sparse decoding read and that dense decoding would have read, to verify that it is active."""

from dataclasses import asdict, dataclass, fields

#: attribute of a ModelRunnerOutput with the counts of its step
COUNTS = "dlm_page_counts"


@dataclass
class PageCounts:
    """Sums over generated positions and choosing layers. A page counts once for all its heads."""

    sparse_rows: int = 0
    dense_rows: int = 0
    pages_read: int = 0
    pages_seen: int = 0

    def add(self, other: "PageCounts", times: int = 1) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))

    def take(self) -> dict[str, int]:
        """Returns the counts since the last call and resets them."""
        counted = asdict(self)
        for name in counted:
            setattr(self, name, 0)
        return counted
