"""Classifier-free guidance: a second stream of each canvas sees it without what the client gave.

The head combines the logits of both, unconditional + (scale + 1) * (conditional - unconditional), see Head. The streams
have caches of their own, which never mix. Tokens that were generated are in both.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_dlm.canvas.feature import Feature, Room
from vllm_dlm.canvas.stream import Stream

if TYPE_CHECKING:
    from vllm_dlm.canvas.canvas import Canvas
    from vllm_dlm.canvas.denoising import Denoising


class Guidance(Feature):
    name = "guidance"

    @classmethod
    def applies(cls, canvas: "Canvas") -> bool:
        return canvas.streams > 1

    def streams(self, state: "Denoising", made: list[Stream], room: Room) -> list[Stream]:
        tokens = unconditional(state.canvas)
        return made + [replace(stream, token_ids=tokens, guides=True, **state.cached(1)) for stream in made]


def unconditional(canvas: "Canvas") -> np.ndarray:
    """[rows] tokens of the unconditional stream: masks where the client gave tokens"""
    tokens = canvas.tokens[: canvas.rows].copy()
    tokens[: canvas.prompt_len] = canvas.mask_id
    return tokens
