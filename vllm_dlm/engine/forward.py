"""The model run over packed canvases."""

from collections.abc import Callable

import torch

from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.group import Packed
from vllm_dlm.engine.layer import LayerStep, together
from vllm_dlm.models.transformer import Normed
from vllm_dlm.plugins.reuse.flow import Behind

#: sees the rows that leave each part of the model, by its name
Watch = Callable[[str, torch.Tensor], None]


def denoise(model, packed: Packed, blocks: KVBlocks, counts: Counts, watch: Watch | None = None) -> torch.Tensor:
    """-> hidden states before the final norm of the rows the head needs, canvas after canvas: [R, E]"""
    behind = through_layers(model, packed, blocks, counts, watch)
    # The last layer may have computed some rows only: where are those of the head among them?
    heads = [
        x[place] + ffn[place]
        for place, x, ffn in (
            (rows.places(group.head), x, ffn) for (rows, x, ffn), group in zip(behind, packed.groups, strict=True)
        )
    ]
    counts.head_rows += sum(map(len, heads))
    return together(heads)


def denoise_live(model, packed: Packed, blocks: KVBlocks, counts: Counts) -> torch.Tensor:
    """The same of every live row: [T, E]"""
    behind = through_layers(model, packed, blocks, counts)
    return together([x for _, x, _ in behind]) + together([ffn for _, _, ffn in behind])


def through_layers(model, packed: Packed, blocks: KVBlocks, counts: Counts, watch: Watch | None = None) -> list[Behind]:
    """-> what the flow of each group returns behind the last layer"""
    layers = model.model.layers
    step = LayerStep(packed, model.model.rope.table, layers, blocks, counts)
    x_TE = model.embed_input_ids(packed.ids)
    if watch is not None:
        watch("the embedding", x_TE)
    normed: Normed = layers[0].input_layernorm(x_TE), x_TE
    for index in range(len(layers)):
        behind = step.run(index, normed)
        residual, added = together([x for _, x, _ in behind]), together([ffn for _, _, ffn in behind])
        if watch is not None:
            watch(f"layer {index}", residual + added)
        if index + 1 < len(layers):
            normed = layers[index + 1].add_and_norm_input(residual, added)
    return behind
