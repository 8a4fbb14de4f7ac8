"""Workers of GPUs whose tensors lie on the CPU."""

import functools
from types import SimpleNamespace

import torch

from tests.pretended_gpu.hopper import MEMORY


@functools.cache
def on_cpu(worker: type) -> None:
    """All of a worker of GPUs but where its tensors lie, and how ranks talk."""
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_random_seed
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    type(current_platform).dist_backend = "gloo"
    load_model = worker.load_model

    def init_device(self):
        self.device = torch.device("cpu")
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        set_random_seed(self.model_config.seed)
        self.init_snapshot = SimpleNamespace(free_memory=MEMORY, total_memory=MEMORY)
        self._init_workspace_and_model_runner()

    def load_on_cpu(self, *args, **kwargs):
        self.vllm_config.load_config.device = "cpu"
        load_model(self, *args, **kwargs)

    worker.init_device, worker.load_model = init_device, load_on_cpu
