"""Memory for the summaries of pages next to vLLM's KV cache: sizes, allocation, and copies of blocks."""

import torch

from vllm_dlm.kernels.haar_pyramid import INVALID
from vllm_dlm.plugins.selection.base import Summaries
from vllm_dlm.plugins.selection.pages import PageSelection


def empty_summaries(cache: torch.Tensor, selection: PageSelection) -> Summaries:
    """Summaries for a cache [blocks, Hkv, block_size, 2 * D], with every page marked as not summarized."""
    blocks, kv_heads, block_size, width = cache.shape
    places = blocks * (block_size // selection.unit)
    (first, first_dtype), (second, second_dtype) = selection.vectors(width // 2, cache.dtype)
    return Summaries(
        torch.zeros(places, kv_heads, first, dtype=first_dtype, device=cache.device),
        torch.full((places, kv_heads, second), INVALID, dtype=second_dtype, device=cache.device),
    )


def bytes_per_block(spec, selection: PageSelection) -> int:
    """Bytes of summaries per block of one layer with this AttentionSpec."""
    vectors = selection.vectors(spec.head_size, spec.dtype)
    page = spec.num_kv_heads * sum(width * dtype.itemsize for width, dtype in vectors)
    return spec.block_size // selection.unit * page


def kv_share(specs: dict, choosing: set[str], selection: PageSelection) -> float:
    """Share of a memory budget for keys and values, if the summaries come from the same budget."""
    if len({spec.page_size_bytes for spec in specs.values()}) == 1 and len({type(s) for s in specs.values()}) == 1:
        # a single pool in which each block holds all layers
        kv = sum(spec.page_size_bytes for spec in specs.values())
        return kv / (kv + sum(bytes_per_block(specs[name], selection) for name in choosing))
    # Groups of layers may share the memory of the pool, and then share summaries. This is an upper bound.
    return 1 / (1 + max(bytes_per_block(specs[name], selection) / specs[name].page_size_bytes for name in choosing))


class SummaryPool:
    """Summaries of all choosing layers. Layers whose keys use the same memory share their summaries."""

    def __init__(self, layers: dict[str, torch.nn.Module], selection: PageSelection):
        self.by_memory: dict[int, Summaries] = {}
        for name, layer in layers.items():
            cache = layer.kv_cache
            if not cache.is_contiguous() or cache.shape[2] % selection.unit:
                raise ValueError(
                    f"dlm.selection: the KV cache of {name} is laid out as {tuple(cache.shape)} with strides "
                    f"{cache.stride()}, which pages of {selection.unit} do not divide; models that mix layers "
                    "of different cache sizes are not supported"
                )
            key = cache.data_ptr()
            if key not in self.by_memory:
                self.by_memory[key] = empty_summaries(cache, selection)
            layer.impl.summaries = self.by_memory[key]

    @property
    def nbytes(self) -> int:
        return sum(vectors.nbytes for own in self.by_memory.values() for vectors in (own.first, own.second))

    def copy_blocks(self, copies, pages_per_block: int) -> None:
        """Copies summaries as vLLM's copy-on-write copies keys. `copies`: (source, destination) blocks."""
        part = torch.arange(pages_per_block)
        source, target = (
            (torch.tensor(side)[:, None] * pages_per_block + part).flatten() for side in zip(*copies, strict=True)
        )
        for own in self.by_memory.values():
            for vectors in (own.first, own.second):
                vectors[target.to(vectors.device)] = vectors[source.to(vectors.device)]
