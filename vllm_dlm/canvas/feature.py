"""Interface of features, which extend denoising beyond filling the masks of one canvas. One module each.

guidance.py, speculation.py, revision.py, verification.py, infill.py and block_causal.py implement it. A feature adds
streams to a step and changes the commit according to their readings. Features keep no reference to their request, to
avoid reference cycles.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_dlm.canvas.caches import StreamCaches
from vllm_dlm.canvas.commit import Commit
from vllm_dlm.canvas.stream import Reading, Stream

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising

#: tokens, and the log-probability record of each
Output = tuple[list[int], list[Any]]


class Room(NamedTuple):
    """Resources of a request's streams in one step."""

    caches: StreamCaches
    canvases: int = 1  # maximum number of streams of a request that speculates, including its own


class Feature:
    name: str
    #: only masks of the current canvas block can still change
    settled = True

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        """Whether the request of this canvas has the feature."""
        raise NotImplementedError

    def __init__(self, canvas: "Canvas"):
        self.open_block(canvas)

    def open_block(self, canvas: "Canvas") -> None:
        """Called when a canvas block begins."""

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        """All streams of a step. `made`: streams made by earlier features. Readings of added streams are appended to
        `others` of the first reading."""
        return made

    def take_over(self, state: "Denoising", reading: Reading) -> Commit | None:
        """A commit that replaces the decoding's choice; None: the decoding chooses."""
        return None

    def absorb(self, state: "Denoising", commit: Commit, reading: Reading) -> Commit:
        """Changes the commit of a step. `commit`: as changed by earlier features"""
        return commit

    def finish(self, state: "Denoising", commit: Commit) -> Commit:
        """Extends a commit after all features have absorbed their readings."""
        return commit

    def applied(self, state: "Denoising", commit: Commit, reading: Reading) -> None:
        """Called after the canvas has changed. `commit`: result of `absorb` of all features"""

    def output(self, state: "Denoising") -> Output | None:
        """Tokens to output; None: the default, Denoising.take_block."""
        return None
