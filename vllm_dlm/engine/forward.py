"""The model run over packed canvases."""

from collections.abc import Callable

import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.layer import LayerStep
from vllm_dlm.engine.packing import Packed
from vllm_dlm.plugins.reuse.flow import Rope

#: sees the rows that leave each part of the model, by its name
Watch = Callable[[str, torch.Tensor], None]


def denoise(model, packed: Packed, blocks: KVBlocks, counts: Counts, watch: Watch | None = None) -> torch.Tensor:
    """-> hidden states before the final norm of the rows the head needs, canvas after canvas: [R, E]"""
    layers, groups = model.model.layers, packed.groups
    x_TE, rope = model.embed_input_ids(packed.ids), Rope(*model.model.rope(packed.positions))
    if watch is not None:
        watch("the embedding", x_TE)
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        done = LayerStep(index, last, layer, blocks, counts).run(groups, x_TE, rope)
        parts = [x for _, x in done]
        if watch is not None:
            watch(f"layer {index}", torch.cat(parts))
        if not last:
            x_TE = torch.cat(parts) if len(parts) > 1 else parts[0]
    # The last layer may have computed some rows only: where are those of the head among them?
    heads = [x[rows.places(group.head)] for (rows, x), group in zip(done, groups, strict=True)]
    counts.head_rows += sum(map(len, heads))
    return torch.cat(heads) if len(heads) > 1 else heads[0]
