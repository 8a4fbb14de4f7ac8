"""The page-sparse backend over vLLM's FlashAttention and under its second model runner: layers, groups, builders,
what is captured and what is replayed, and what a worker asks of the runner."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

import vllm_dlm
from tests.pretended_gpu.operators import FLASH_CALLS

HEADS, KV_HEADS, DIM, BLOCK = 8, 2, 64, 64
REQUESTS, LONGEST, BLOCKS = 8, 2048, 128
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
SELECTION = {"name": "unique", "min_context": 0, "budget_tokens": 256, "dense_layers": [0]}


def run() -> None:
    vllm_dlm.register()
    from vllm.config import set_current_vllm_config

    from tests.page_sparse.models import write
    from vllm_dlm.kernels.sparse_attention import naive
    from vllm_dlm.page_sparse import cuda

    with tempfile.TemporaryDirectory() as folder:
        config = configured(write("llama", Path(folder)))
    no_other_ranks = mock.patch("vllm.v1.attention.backends.flash_attn.get_dcp_world_size_and_rank", lambda *_: (1, 0))
    with set_current_vllm_config(config), no_other_ranks:
        layers = made_layers(config)
        runner = Runner(config, layers)
    modes(config, runner)
    # as it is defined: the way of CPUs has no answer for rows without keys
    cuda.sparse_attention = naive.sparse_attention
    steps(runner)


def configured(model):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_dlm.integration.autoregressive import WORKERS

    config = EngineArgs(
        str(model),
        dtype="bfloat16",
        max_model_len=LONGEST,
        max_num_seqs=REQUESTS,
        skip_tokenizer_init=True,
        additional_config={"dlm": {"selection": SELECTION}},
    ).create_engine_config()
    assert config.parallel_config.worker_cls == WORKERS["cuda"]
    assert config.use_v2_model_runner, "this part is about the second runner"
    assert config.cache_config.block_size == BLOCK
    return config


def made_layers(config):
    from vllm.model_executor.layers.attention import Attention

    from vllm_dlm.integration.patches import patch_worker
    from vllm_dlm.integration.worker.selecting_worker import SelectingGPUWorker  # noqa: F401 - imports on CUDA
    from vllm_dlm.page_sparse import cuda, layer_backends

    layer_backends.install()
    patch_worker()
    torch.set_default_dtype(torch.bfloat16)
    layers = {
        name: Attention(HEADS, DIM, DIM**-0.5, num_kv_heads=KV_HEADS, cache_config=config.cache_config, prefix=name)
        for name in LAYERS
    }
    torch.set_default_dtype(torch.float32)
    dense, choosing = layers.values()
    assert dense.attn_backend.get_name() == "FLASH_ATTN" and not isinstance(dense.impl, cuda.SelectingFlashImpl)
    assert choosing.attn_backend is cuda.SelectingFlashBackend and isinstance(choosing.impl, cuda.SelectingFlashImpl)
    assert choosing.impl.vllm_flash_attn_version == 3
    return layers


class Runner:
    """As much of vLLM's second model runner as prepares attention."""

    def __init__(self, config, layers):
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.worker.gpu.attn_utils import init_attn_backend
        from vllm.v1.worker.gpu.input_batch import InputBuffers

        from vllm_dlm.page_sparse.page_counts import PageCounts
        from vllm_dlm.page_sparse.summaries import SummaryPool

        device = torch.device("cpu")
        spec = layers[LAYERS[1]].get_kv_cache_spec(config)
        self.kv_cache_config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(list(LAYERS), spec)])
        self.attn_groups, self.graphs, sizes = init_attn_backend(self.kv_cache_config, config, device)
        assert sizes == [BLOCK]
        self.buffers = InputBuffers(REQUESTS, 512, device)
        self.slots = torch.full((1, 512), -1)
        self.tables = torch.zeros(REQUESTS, LONGEST // BLOCK, dtype=torch.int32)
        self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.zeros(REQUESTS, np.int32)))
        self.layer = layers[LAYERS[1]]
        self.layer.kv_cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * DIM).to(torch.bfloat16)
        self.layer.impl.dcp_world_size = 1
        selection = self.layer.impl.selection
        SummaryPool({LAYERS[1]: self.layer}, selection)
        selection.store(self.layer.kv_cache, torch.arange(BLOCKS), self.layer.impl.summaries)
        (group,) = [group for groups in self.attn_groups for group in groups if LAYERS[1] in group.layer_names]
        self.builder = group.get_metadata_builder(0)
        self.counts = self.builder.counts = PageCounts()
        from vllm_dlm.integration.worker.selecting_worker import PageSelectionMixin

        worker = SimpleNamespace(model_runner=self)
        self.builder.prompt_lens = lambda common: PageSelectionMixin._prompt_lens(worker, common)

    def prepare(self, batch, mode, capture=False):
        """vLLM's own step from a batch to the metadata of its layers"""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        state = SimpleNamespace(
            max_model_len=LONGEST, supports_mm_inputs=False, encoder_cache=None, model_config=None, rope_state=None
        )
        count = batch.num_reqs_after_padding
        return DefaultModelState.prepare_attn(
            state,
            batch,
            mode,
            (self.tables[:count],),
            self.slots[:, : batch.num_tokens_after_padding],
            self.attn_groups,
            self.kv_cache_config,
            for_capture=capture,
        )[LAYERS[1]]


def modes(config, runner) -> None:
    from vllm.config import CUDAGraphMode

    builder = runner.builder
    assert not builder.use_full_cuda_graph and builder.max_num_splits == 0 and builder.aot_schedule
    compilation = config.compilation_config
    assert compilation.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    mode = compilation.resolve_cudagraph_mode_and_sizes(
        runner.graphs.min_cg_support,
        runner.graphs.min_cg_attn_backend,
        1,
        use_v2_model_runner=True,
        kv_cache_config=runner.kv_cache_config,
        max_num_reqs=REQUESTS,
    )
    assert mode == CUDAGraphMode.FULL_AND_PIECEWISE, mode
    print(f"  {runner.graphs.min_cg_support.name}: {mode.name}")


def steps(runner) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.input_batch import InputBatch

    FLASH_CALLS.clear()
    full, eager = CUDAGraphMode.FULL, CUDAGraphMode.NONE
    dummy = InputBatch.make_dummy(4, 4, runner.buffers, max_query_len=1)
    captured = runner.prepare(dummy, eager, capture=True)
    assert captured.sparse is not None and captured.dense is None and captured.scheduler_metadata is None
    assert vars(runner.counts) == {"sparse_rows": 0, "dense_rows": 0, "pages_read": 0, "pages_seen": 0}

    # a full graph of four rows, three of them real: one chooses, one is short, one is a prompt's last token
    singles = [(1, 1000, 800), (1, 130, 100), (1, 900, 900)]
    built, batch = step(runner, singles, full, padded=4)
    for name in ("q_starts", "page_table", "kv_lens", "num_pages", "recent"):
        one, other = getattr(captured.sparse, name), getattr(built.sparse, name)
        assert one.data_ptr() == other.data_ptr() and one.shape == other.shape, name
    assert captured.full_pages.data_ptr() == built.full_pages.data_ptr()
    assert (runner.counts.sparse_rows, runner.counts.dense_rows) == (1, 1)
    replayed = forward(runner, captured, batch)
    assert torch.equal(replayed, forward(runner, built, batch)) and not FLASH_CALLS
    compare(runner, replayed, batch, singles, chooses=[0])

    # prompts beside generated positions: FlashAttention 3 without a plan, and without the splits of full graphs
    mixed = [(1, 1000, 800), (100, 300, 400), (1, 100, 50)]
    built, batch = step(runner, mixed, eager)
    compare(runner, forward(runner, built, batch), batch, mixed, chooses=[0])
    assert [(call["rows"], call["splits"], call["planned"]) for call in FLASH_CALLS] == [(101, 0, False)]
    # all of it read whole: one call, planned ahead
    FLASH_CALLS.clear()
    prompt = [(100, 100, 120)]
    built, batch = step(runner, prompt, eager)
    compare(runner, forward(runner, built, batch), batch, prompt, chooses=[])
    assert [(call["rows"], call["splits"], call["planned"]) for call in FLASH_CALLS] == [(100, 0, True)]


def step(runner, requests, mode, padded=None):
    """requests: (rows, keys, prompt) -> metadata and the batch, as vLLM prepares it"""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    counts, lens, prompts = (np.array(column, np.int32) for column in zip(*requests, strict=True))
    real, rows = len(requests), int(counts.sum())
    filled = padded or real
    batch = InputBatch.make_dummy(filled, rows + filled - real, runner.buffers)
    starts = np.concatenate([[0], counts.cumsum(), np.full(filled - real, rows)]).astype(np.int32)
    batch.num_reqs, batch.num_reqs_after_padding = real, filled
    batch.num_tokens, batch.num_tokens_after_padding = rows, rows + filled - real
    batch.num_scheduled_tokens, batch.query_start_loc_np = counts, starts
    runner.buffers.query_start_loc[: filled + 1] = torch.from_numpy(starts)
    runner.buffers.seq_lens[:] = 0
    runner.buffers.seq_lens[:real] = torch.from_numpy(lens)
    batch.seq_lens_cpu_upper_bound = torch.zeros(filled, dtype=torch.int32)
    batch.seq_lens_cpu_upper_bound[:real] = torch.from_numpy(lens)
    # requests lie elsewhere in the runner's table than in the batch
    batch.idx_mapping_np = np.arange(real)[::-1] + 1
    batch.is_prefilling_np = lens - counts < prompts
    runner.req_states.prompt_len.np[batch.idx_mapping_np] = prompts
    runner.tables[:] = 0
    for i, blocks in enumerate(torch.randperm(BLOCKS - 1).add(1).split(20)[:real]):
        runner.tables[i, : len(blocks)] = blocks
    runner.slots[:] = -1
    for i, (count, keys) in enumerate(zip(counts, lens, strict=True)):
        position = torch.arange(keys - count, keys)
        where = runner.tables[i, position // BLOCK] * BLOCK + position % BLOCK
        runner.slots[0, starts[i] : starts[i + 1]] = where
    return runner.prepare(batch, mode), batch


def forward(runner, meta, batch):
    torch.manual_seed(0)
    shape = batch.num_tokens_after_padding, HEADS, DIM
    batch.query = torch.randn(shape).to(torch.bfloat16)
    key = torch.zeros(shape[0], KV_HEADS, DIM, dtype=torch.bfloat16)
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    return runner.layer.impl.forward(runner.layer, batch.query, key, key, runner.layer.kv_cache, meta, output=out)


def compare(runner, out, batch, requests, chooses) -> None:
    """Rows that choose are elsewhere than dense attention, and all others are there."""
    from tests.pretended_gpu.operators import attention

    starts = batch.query_start_loc_np
    for i, (_, keys, _) in enumerate(requests):
        blocks = runner.tables[i, : -(-keys // BLOCK)].long()
        kv = runner.layer.kv_cache[blocks].transpose(1, 2).flatten(0, 1)[:keys]
        rows = slice(int(starts[i]), int(starts[i + 1]))
        want = attention(batch.query[rows], kv[..., :DIM], kv[..., DIM:], DIM**-0.5, True)
        apart = float((out[rows] - want).abs().max())
        assert (apart > 0.02) == (i in chooses), (i, apart)
