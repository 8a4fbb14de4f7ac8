"""Functions that tests run inside an engine's worker (`LLM.collective_rpc`); the first argument is the worker."""

import numpy as np
import torch

from vllm_dlm.engine.canvas_attention import CanvasAttention


def logits_of(worker, canvases: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every position of every canvas from one packed forward: [L, V] each."""
    return [logits for _, logits in states_of(worker, canvases)]


@torch.inference_mode()
def states_of(worker, canvases: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(hidden states after the embedding, every layer and the final norm [layers + 1, L, E], logits [L, V])"""
    model = worker.model_runner.model
    lengths = [len(canvas) for canvas in canvases]
    ids = torch.tensor(np.concatenate(canvases))
    rope = model.model.rope(torch.cat([torch.arange(length) for length in lengths]))
    attend = CanvasAttention(lengths, lengths, model.model.layers[0].head_dim ** -0.5)
    states = [model.embed_input_ids(ids)]
    for layer in model.model.layers:
        states.append(layer(states[-1], rope, attend))
    logits = model.compute_logits(states[-1])
    states[-1] = model.model.norm(states[-1])
    return list(zip(torch.stack(states).split(lengths, 1), logits.split(lengths), strict=True))


def open_requests(worker) -> int:
    return len(worker.model_runner.requests)
