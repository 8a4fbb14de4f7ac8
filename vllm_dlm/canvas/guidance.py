"""Classifier-free guidance: an unconditional stream per canvas, in which the client's tokens are masked.

The head combines the logits of both streams: unconditional + (scale + 1) * (conditional - unconditional), see Head.
Each stream has its own caches. Generated tokens are in both streams.
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
    """[rows] tokens of the unconditional stream, with masks at the prompt"""
    tokens = canvas.tokens[: canvas.rows].copy()
    tokens[: canvas.prompt_len] = canvas.mask_id
    return tokens
