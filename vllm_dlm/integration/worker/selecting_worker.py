"""vLLM's workers with page summaries next to the KV cache.

Read in vLLM 0.32: v1/worker/{cpu,gpu}_worker.py, v1/worker/gpu_model_runner.py
and v1/worker/gpu/model_runner.py (`attn_groups`, the batch's prompt lengths),
v1/outputs.py.
"""

from dataclasses import asdict

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import WorkerBase

from vllm_dlm.configuration import selection_of
from vllm_dlm.integration.patches import patch_worker
from vllm_dlm.page_sparse import layer_backends
from vllm_dlm.page_sparse.page_counts import COUNTS, PageCounts
from vllm_dlm.page_sparse.summaries import SummaryPool, kv_share

logger = init_logger("vllm." + __name__)


class PageSelectionMixin(WorkerBase):
    """Adds page summaries to a worker of vLLM."""

    def load_model(self, *args, **kwargs) -> None:
        layer_backends.install()
        patch_worker()
        self.dlm_selection = selection_of(self.vllm_config)
        self.dlm_counts, self.dlm_unsent = PageCounts(), PageCounts()
        super().load_model(*args, **kwargs)
        found = self._choosing()
        if not found:
            raise ValueError(
                f"dlm.selection: {self.model_config.architecture} has no attention layer for {self.dlm_selection}; "
                "start without dlm.selection"
            )
        logger.info_once("Selection %r chooses pages in %d attention layers.", self.dlm_selection, len(found))

    def _choosing(self) -> dict[str, Attention]:
        found = get_layers_from_vllm_config(self.vllm_config, Attention)
        return {name: layer for name, layer in found.items() if hasattr(layer.impl, "summaries")}

    def determine_available_memory(self) -> int:
        """Reserves a part of the KV cache's memory for the summaries."""
        available = super().determine_available_memory()
        specs = self.get_kv_cache_spec()
        # a layer that shares another layer's KV cache has neither a cache nor summaries
        choosing = self._choosing().keys() & specs.keys()
        return int(available * kv_share(specs, choosing, self.dlm_selection))

    def initialize_from_config(self, kv_cache_config, *args, **kwargs) -> None:
        super().initialize_from_config(kv_cache_config, *args, **kwargs)
        self.dlm_pool = SummaryPool(self._choosing(), self.dlm_selection)
        logger.info_once("Page summaries take %.1f MiB in addition to the KV cache.", self.dlm_pool.nbytes / 2**20)
        for group in (group for groups in self.model_runner.attn_groups for group in groups):
            for builder in group.metadata_builders:
                if hasattr(builder, "prompt_lens"):
                    builder.prompt_lens, builder.counts = self._prompt_lens, self.dlm_unsent

    def compile_or_warm_up_model(self, *args, **kwargs):
        times = super().compile_or_warm_up_model(*args, **kwargs)
        self.dlm_unsent.take()  # discard counts of the warm-up
        return times

    def execute_dummy_batch(self) -> None:
        """Runs while other data-parallel ranks work. Discards its counts; those of real steps are already sent."""
        super().execute_dummy_batch()
        self.dlm_unsent.take()

    def _prompt_lens(self, common) -> list[int] | None:
        """Prompt lengths of the requests of the batch being prepared, in its order."""
        runner = self.model_runner
        if hasattr(runner, "req_states"):  # model runner V2
            return None if common.req_idx is None else runner.req_states.prompt_len.np[common.req_idx].tolist()
        batch = runner.input_batch
        return batch.num_prompt_tokens[: batch.num_reqs].tolist() if batch.num_reqs else None

    def execute_model(self, scheduler_output, *args, **kwargs):
        if copies := scheduler_output.kv_cache_block_copies:
            self.dlm_pool.copy_blocks(copies, self.cache_config.block_size // self.dlm_selection.unit)
        return self._counted(super().execute_model(scheduler_output, *args, **kwargs))

    def sample_tokens(self, *args, **kwargs):
        return self._counted(super().sample_tokens(*args, **kwargs))

    def _counted(self, output):
        """Attaches the step's counts to the output that carries its tokens."""
        carrier = output
        for wrapped in ("_model_runner_output", "model_runner_output"):  # asynchronous outputs of V1 and V2
            carrier = getattr(carrier, wrapped, carrier)
        if carrier is not None and getattr(carrier, "req_ids", None):
            taken = self.dlm_unsent.take()
            self.dlm_counts.add(PageCounts(**taken))
            setattr(carrier, COUNTS, taken)
        return output

    def dlm_page_counts(self) -> dict[str, int]:
        """Counts since the start, for `LLM.collective_rpc`."""
        total = PageCounts(**asdict(self.dlm_counts))
        total.add(self.dlm_unsent)
        return asdict(total)


class SelectingGPUWorker(PageSelectionMixin, Worker):
    pass


# On CUDA this import would replace torch's streams and events with stubs.
if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class SelectingCPUWorker(PageSelectionMixin, CPUWorker):
        pass
