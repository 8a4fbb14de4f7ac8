"""The shadow of a canvas block: what would the model say of a token that stands if it did not see it?

Beside the rows of the canvas live as many more as the block has, masks at its
positions. Each sees the whole canvas but for the token of its own position,
and the other shadow rows; nobody sees them. Their keys and values go nowhere,
and those of the canvas are read where its own rows have just put them.
"""

from dataclasses import replace

import numpy as np

from vllm_dlm.engine.canvas import NOTHING
from vllm_dlm.engine.packing import Stream
from vllm_dlm.plugins.reuse.base import Progress, Reuse, StepPlan, span


def shadow(stream: Stream, standing: np.ndarray, at: Progress) -> Stream:
    """`stream`: the canvas; `standing` [S]: positions of the block that are asked for"""
    start, end = at.block
    rows = span(*at.rows_reading(np.array((start, end))))
    tokens = stream.token_ids.copy()
    tokens[rows] = at.mask_id
    return replace(
        stream,
        reuse=Reuse(),  # every row of it is new in every step
        plan=StepPlan.dense(rows),
        token_ids=tokens,
        head_positions=at.rows_reading(standing),
        changed=NOTHING,
        feature_rows=0,
        view=None,
        filtered=False,
        chooses=False,
        hole=at.shift,
    )
