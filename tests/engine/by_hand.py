"""Canvases denoised by hand: the model's logits of every position, in the order of the text, and a plain loop."""

import numpy as np
import torch

from tests.engine.worker_calls import logits_of


def probabilities(llm, canvas: list[int], shift: int) -> torch.Tensor:
    """[N, V] of what each position holds"""
    ((logits,),) = llm.collective_rpc(logits_of, args=([canvas],))
    read = [max(position - shift, 0) for position in range(len(canvas))]
    return logits[read].softmax(-1)


def most_probable_first(llm, canvas: list[int], response: tuple[int, int], width: int) -> list[int]:
    """The response, one token a step and block by block, the most probable one first."""
    config = llm.model_config.hf_config
    mask, canvas = config.mask_token_id, list(canvas)
    for start in range(*response, width):
        end = min(start + width, response[1])
        while holes := [position for position in range(start, end) if canvas[position] == mask]:
            probs = probabilities(llm, canvas, config.logits_shift)[holes]
            without_mask = probs.clone()
            without_mask[:, mask] = -1
            tokens = without_mask.argmax(-1)
            best = int(np.argmax(probs.gather(1, tokens[:, None]).numpy()))
            canvas[holes[best]] = int(tokens[best])
    return canvas[response[0] : response[1]]
