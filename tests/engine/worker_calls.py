"""Functions that tests run inside an engine's worker (`LLM.collective_rpc`); the first argument is the worker."""

import numpy as np
import torch
import torch.nn.functional as F

from vllm_dlm.step.counts import Counts
from vllm_dlm.step.denoiser import plain_stream


def logits_of(worker, canvases: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every position of every canvas from one packed forward: [L, V] each."""
    return [logits for _, logits in states_of(worker, canvases)]


@torch.inference_mode()
def states_of(worker, canvases: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(hidden states after the embedding, every layer and the final norm [layers + 1, L, E], logits [L, V])"""
    model, denoiser = worker.model_runner.model, worker.model_runner.denoiser
    lengths, states = [len(canvas) for canvas in canvases], []
    streams = [plain_stream(np.array(canvas), np.arange(len(canvas))) for canvas in canvases]
    hidden = denoiser.forward(streams, Counts(), lambda _, x: states.append(x.clone()))
    assert torch.equal(hidden, states[-1])  # all rows are those of the head
    states[-1] = model.model.norm(hidden)
    logits = model.compute_logits(hidden)
    return list(zip(torch.stack(states).cpu().split(lengths, 1), logits.cpu().split(lengths), strict=True))


@torch.inference_mode()
def block_causal_logits_of(worker, canvas: list[int], width: int) -> torch.Tensor:
    """Logits [L, V] of a canvas whose rows attend to the blocks before theirs and their own, in one forward"""
    runner = worker.model_runner
    block = torch.arange(len(canvas), device=runner.device) // width
    seen = block[:, None] >= block  # [L, L]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in qkv)  # [1, heads, L, D]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return context[0].transpose(0, 1).flatten(1)

    ids, positions = torch.tensor(canvas, device=runner.device), torch.arange(len(canvas), device=runner.device)
    with runner.forwards():
        return runner.model.compute_logits(runner.model(ids, positions, attend)).cpu()


def open_requests(worker) -> int:
    return len(worker.model_runner.requests)
