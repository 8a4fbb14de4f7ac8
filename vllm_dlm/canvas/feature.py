"""The interface of features: what a request does besides filling masks of one canvas, one module each.

guidance.py, speculation.py, revision.py, infill.py and block_causal.py implement it. A feature adds streams to a step
and turns what was read there into a commit. Features keep no reference to their request, which would be a cycle.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_dlm.canvas.caches import StreamCaches
from vllm_dlm.canvas.commit import Commit
from vllm_dlm.canvas.stream import Reading, Stream

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising

#: tokens, and what was recorded of each
Output = tuple[list[int], list[Any]]


class Room(NamedTuple):
    """What the streams of a request may use in one step."""

    caches: StreamCaches
    canvases: int = 1  # streams of a request that speculates, its own among them


class Feature:
    name: str
    #: no token of the current canvas block can change any more, except masks
    settled = True

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        """Whether the request of this canvas has the feature."""
        raise NotImplementedError

    def __init__(self, canvas: "Canvas"):
        self.open_block(canvas)

    def open_block(self, canvas: "Canvas") -> None:
        """A canvas block begins."""

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        """All streams of a step, where those before this feature have made some. Readings of added streams are added
        to `others` of the first reading."""
        return made

    def take_over(self, state: "Denoising", reading: Reading) -> Commit | None:
        """A commit in place of what the decoding chooses; None: the decoding chooses."""
        return None

    def absorb(self, state: "Denoising", commit: Commit, reading: Reading) -> Commit:
        """The commit of a step, where those before this feature have come to `commit`."""
        return commit

    def finish(self, state: "Denoising", commit: Commit) -> Commit:
        """Adds what follows from a commit that all features have absorbed."""
        return commit

    def applied(self, state: "Denoising", commit: Commit, reading: Reading) -> None:
        """The canvas has changed. `commit` is what all features have absorbed."""

    def output(self, state: "Denoising") -> Output | None:
        """Tokens to hand out; None: as the request hands them out without this feature."""
        return None
