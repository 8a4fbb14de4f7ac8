"""Page statistics beside vLLM's KV cache: their memory, where they hang, and blocks that are copied."""

import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics
from vllm_dlm.kernels.haar_pyramid.statistics import statistics_bytes
from vllm_dlm.plugins.selection.base import Selection


def bytes_per_block(spec, selection: Selection) -> int:
    """Of one layer with this AttentionSpec."""
    page = statistics_bytes(spec.num_kv_heads, spec.head_size, spec.dtype.itemsize, selection.std_kind)
    return spec.block_size // selection.page_size * page


def kv_share(specs: dict, choosing: set[str], selection: Selection) -> float:
    """The part of a memory budget that is left to keys and values when the statistics are taken from it too."""
    if len({spec.page_size_bytes for spec in specs.values()}) == 1 and len({type(s) for s in specs.values()}) == 1:
        # one pool, every layer in each of its blocks
        kv = sum(spec.page_size_bytes for spec in specs.values())
        return kv / (kv + sum(bytes_per_block(specs[name], selection) for name in choosing))
    # Groups of layers may lie over each other in the pool, and so do their statistics: none has more than this.
    return 1 / (1 + max(bytes_per_block(specs[name], selection) / specs[name].page_size_bytes for name in choosing))


class StatisticsPool:
    """Every choosing layer's statistics; layers whose keys lie in the same memory share theirs."""

    def __init__(self, layers: dict[str, torch.nn.Module], selection: Selection):
        self.selection = selection
        self.by_memory: dict[int, PageStatistics] = {}
        for name, layer in layers.items():
            pages = layer.kv_cache
            if not pages.is_contiguous() or pages.shape[2] % selection.page_size:
                raise ValueError(
                    f"dlm.selection: the KV cache of {name} is laid out as {tuple(pages.shape)} with strides "
                    f"{pages.stride()}, which pages of {selection.page_size} do not divide; models that mix layers "
                    "of different cache sizes are not supported"
                )
            key = pages.data_ptr()
            if key not in self.by_memory:
                self.by_memory[key] = PageStatistics.empty(pages, selection.page_size, selection.std_kind)
            layer.impl.statistics = self.by_memory[key]

    @property
    def nbytes(self) -> int:
        return sum(statistics.nbytes for statistics in self.by_memory.values())

    def copy_blocks(self, copies, pages_per_block: int) -> None:
        """What vLLM's copy-on-write does to keys. `copies`: (source, destination) blocks."""
        part = torch.arange(pages_per_block)
        source, target = (
            (torch.tensor(side)[:, None] * pages_per_block + part).flatten() for side in zip(*copies, strict=True)
        )
        for statistics in self.by_memory.values():
            device = statistics.mean.device
            for values in (statistics.mean, statistics.spread):
                values[target.to(device)] = values[source.to(device)]
