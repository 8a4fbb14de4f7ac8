"""vLLM's workers with the denoising runner. Read in vLLM 0.32: v1/worker/{cpu,gpu}_worker.py."""

import os
import time

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import enable_gpu_sync_check
from vllm.utils.mem_utils import format_gib
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_dlm.integration.worker.runner import DenoisingRunner

logger = init_logger(f"vllm.{__name__}")

#: vLLM's expert kernels use Triton's default precision for float32 products, which rounds operands to 10 mantissa bits.
#: A float32 model would choose other tokens than the published code.
FLOAT32 = "TRITON_F32_DEFAULT", "ieee"


class DiffusionGPUWorker(Worker):
    def __init__(self, *args, **kwargs):
        os.environ.setdefault(*FLOAT32)  # read when a kernel is compiled
        super().__init__(*args, **kwargs)
        self.use_v2_model_runner = False

    def _make_model_runner(self) -> DenoisingRunner:
        return DenoisingRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        asked_for = self.cache_config.kv_cache_memory_bytes
        return super().determine_available_memory() - (0 if asked_for else self.model_runner.captured_memory())

    def compile_or_warm_up_model(self) -> CompilationTimes:
        begin, before = time.perf_counter(), torch.accelerator.get_memory_info()[0]
        self.model_runner.warm_up()
        if self.model_runner.captures:
            taken = before - torch.accelerator.get_memory_info()[0]
            left = self.model_runner.captured_memory()
            logger.info(
                "Captured steps take %s GiB of the %s GiB reserved for them", format_gib(taken), format_gib(left)
            )
        set_random_seed(self.model_config.seed)
        enable_gpu_sync_check()  # for VLLM_GPU_SYNC_CHECK
        return CompilationTimes(language_model=time.perf_counter() - begin, encoder=0.0)


#: capacity of oneDNN's cache of matrix products by shape, 1,024 by default. The number of rows of packed batches varies
#: without limit, so that cache would grow to gigabytes. 128 entries take a few hundred MB, and no step is slower.
ONEDNN = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"


if current_platform.is_cpu():
    # On CUDA this import would replace torch's events and streams with stubs.
    from vllm.v1.worker import cpu_worker

    class DiffusionCPUWorker(cpu_worker.CPUWorker):
        def __init__(self, *args, **kwargs):
            os.environ.setdefault(*ONEDNN)  # read at the first matrix product
            super().__init__(*args, **kwargs)
            self.use_v2_model_runner = False

        def init_device(self) -> None:
            # The CPU worker creates its runner inline, so replace the class during this call. See WRITES in patches.py.
            theirs, cpu_worker.CPUModelRunner = cpu_worker.CPUModelRunner, DenoisingRunner
            try:
                super().init_device()
            finally:
                cpu_worker.CPUModelRunner = theirs

        def compile_or_warm_up_model(self) -> CompilationTimes:
            set_random_seed(self.model_config.seed)
            return CompilationTimes(language_model=0.0, encoder=0.0)
