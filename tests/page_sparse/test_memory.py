"""Summaries are taken from the KV cache's memory, are indexed by physical page, and are copied with its blocks."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.worker.worker_base import WorkerBase

from tests.page_sparse.conftest import SPARSE
from vllm_dlm.integration.worker.selecting_worker import PageSelectionMixin
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.page_sparse.summaries import SummaryPool, kv_share
from vllm_dlm.plugins.selection.unique import Unique


class Worker(WorkerBase):
    def __init__(self): ...

    def compile_or_warm_up_model(self):
        self.dlm_unsent.add(PageCounts(sparse_rows=3))
        return "seconds"


def held(worker) -> tuple[int, int, int]:
    """-> bytes of keys and values, bytes of summaries, and number of layers with summaries."""
    context = worker.vllm_config.compilation_config.static_forward_context
    caches = {
        layer.kv_cache.untyped_storage().data_ptr(): layer.kv_cache.untyped_storage() for layer in context.values()
    }
    return sum(storage.nbytes() for storage in caches.values()), worker.dlm_pool.nbytes, len(worker.dlm_pool.by_memory)


@pytest.mark.parametrize("fields", [{}, {"std_kind": "vector", "dense_layers": []}])
def test_the_budget_holds_both(decoder, fields):
    budget = 1 << 24
    llm = decoder("llama", SPARSE | fields, kv_cache_memory_bytes=budget, block_size=128)
    ((kv, summaries, layers),) = llm.collective_rpc(held)
    assert layers == 4 - len((SPARSE | fields)["dense_layers"])
    assert summaries > kv / 50
    assert 0.95 * budget < kv + summaries <= budget


def spec(**changed):
    values = {
        "num_kv_heads": 2,
        "head_size": 32,
        "dtype": torch.bfloat16,
        "block_size": 64,
        "page_size_bytes": 64 * 256,
    }
    return SimpleNamespace(**values | changed)


def test_share_of_one_pool():
    selection = Unique(page_size=32, budget_tokens=256)
    page = 2 * (32 * 2 + 4)
    specs = {"a": spec(), "b": spec(), "c": spec()}
    assert kv_share(specs, {"a", "b"}, selection) == pytest.approx(3 * 64 * 256 / (3 * 64 * 256 + 2 * 2 * page))


def test_share_where_layers_lie_over_each_other():
    """The share of summaries in the pool is at most that of the layer with the largest share."""
    selection = Unique(page_size=32, budget_tokens=256)
    page = 2 * (32 * 2 + 4)
    specs = {"a": spec(), "window": spec(page_size_bytes=64 * 512)}
    assert kv_share(specs, {"a"}, selection) == pytest.approx(1 / (1 + 2 * page / (64 * 256)))


def layer_over(pages: torch.Tensor):
    return SimpleNamespace(kv_cache=pages, impl=SimpleNamespace())


def test_layers_over_the_same_memory_share_summaries():
    pages, other = torch.zeros(4, 2, 64, 64), torch.zeros(4, 2, 64, 64)
    layers = {"a": layer_over(pages), "b": layer_over(pages), "c": layer_over(other)}
    pool = SummaryPool(layers, Unique(page_size=32, budget_tokens=256))
    assert layers["a"].impl.summaries is layers["b"].impl.summaries is not layers["c"].impl.summaries
    assert pool.nbytes == 2 * 8 * 2 * (32 * 4 + 4)


def test_padded_blocks_are_refused():
    padded = torch.zeros(4, 2, 96, 64)[:, :, :64]
    with pytest.raises(ValueError, match=r"model\.layers\.3"):
        SummaryPool({"model.layers.3": layer_over(padded)}, Unique(page_size=32, budget_tokens=256))


def test_summaries_of_copied_blocks():
    pages = torch.randn(4, 2, 64, 64)
    layer, selection = layer_over(pages), Unique(page_size=32, budget_tokens=256)
    pool = SummaryPool({"a": layer}, selection)
    summaries = layer.impl.summaries
    selection.store(pages, torch.arange(4), summaries)  # pages of blocks 0 and 1
    pool.copy_blocks([(0, 2), (1, 3)], pages_per_block=2)
    assert torch.equal(summaries.first[4:], summaries.first[:4])
    assert torch.equal(summaries.second[4:], summaries.second[:4])


def test_what_is_read_before_the_first_request_is_not_counted():
    class Warmed(PageSelectionMixin, Worker):
        pass

    worker = Warmed()
    worker.dlm_counts, worker.dlm_unsent = PageCounts(), PageCounts()
    assert worker.compile_or_warm_up_model() == "seconds" and worker.dlm_page_counts()["sparse_rows"] == 0
