"""Canvases packed into one forward without padding, and the exact model run over them."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_dlm.engine.attention import CanvasAttention


@dataclass
class Stream:
    """One canvas to denoise: a request, or its guidance twin."""

    token_ids: np.ndarray  # [N]
    head_rows: np.ndarray  # rows whose hidden state the head needs, ascending


def split(streams: list[Stream], max_rows: int) -> list[list[Stream]]:
    """Groups of whole canvases of at most `max_rows` rows (one canvas may be alone with more)."""
    groups, rows = [[]], 0
    for stream in streams:
        if groups[-1] and rows + len(stream.token_ids) > max_rows:
            groups.append([])
            rows = 0
        groups[-1].append(stream)
        rows += len(stream.token_ids)
    return groups


def denoise(model, streams: list[Stream], device) -> torch.Tensor:
    """-> hidden states before the final norm of all head rows, stream after stream: [R, E]"""
    lengths = [len(stream.token_ids) for stream in streams]
    ids_T, positions_T, head_R = pack(streams, device)
    layers = model.model.layers
    scale = layers[0].head_dim ** -0.5
    x_TE, rope = model.embed_input_ids(ids_T), model.model.rope(positions_T)
    attend = CanvasAttention(lengths, lengths, scale)
    for layer in layers[:-1]:
        x_TE = layer(x_TE, rope, attend)
    # Nobody reads the last layer's output but the head, so only its rows are queried and fed forward there.
    last = layers[-1]
    h_TE = last.input_layernorm(x_TE)
    attend = CanvasAttention([len(stream.head_rows) for stream in streams], lengths, scale)
    head_rope = tuple(part[head_R] for part in rope)
    context = attend(last.query(h_TE[head_R], head_rope), last.key(h_TE, rope), last.value(h_TE))
    x_RE = x_TE[head_R] + last.attention_output(context)
    return x_RE + last.feed_forward(x_RE)


def pack(streams: list[Stream], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [T], positions [T] and head rows [R] of the packed canvases, in one upload."""
    lengths = np.array([len(stream.token_ids) for stream in streams])
    offsets = np.cumsum(lengths) - lengths
    ids = np.concatenate([stream.token_ids for stream in streams])
    positions = np.arange(len(ids)) - np.repeat(offsets, lengths)
    heads = np.concatenate([stream.head_rows + offset for stream, offset in zip(streams, offsets, strict=True)])
    packed = torch.from_numpy(np.concatenate([ids, positions, heads]).astype(np.int64))
    return packed.to(device, non_blocking=True).split([len(ids), len(ids), len(heads)])
