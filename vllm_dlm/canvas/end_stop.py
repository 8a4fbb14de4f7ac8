"""End stop: once the canvas block holds an end token, all later positions of the block hold it, too.

No mask is left after the first end token, so the answer ends when no mask is left before it.
"""

from typing import TYPE_CHECKING

import numpy as np

from vllm_dlm.canvas.commit import Commit
from vllm_dlm.canvas.feature import Feature
from vllm_dlm.plugins.decoding.roles import EndStopDecoding

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising


class EndStop(Feature):
    name = "end_stop"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        decoding = canvas.options.decoding
        return isinstance(decoding, EndStopDecoding) and decoding.end_stop and not canvas.layout.holes

    def finish(self, state: "Denoising", commit: Commit) -> Commit:
        canvas = state.canvas
        tokens = canvas.tokens[: canvas.end].copy()
        tokens[commit.positions] = commit.tokens
        # a request may name the mask token as a stop token, but masks end nothing
        ends = np.isin(tokens[canvas.prompt_len :], list(state.sampling.stop_ids - {canvas.mask_id}))
        if not ends.any():
            return commit
        first = canvas.prompt_len + int(ends.argmax())
        return commit.with_token(first + 1 + np.flatnonzero(tokens[first + 1 :] != tokens[first]), tokens[first])
