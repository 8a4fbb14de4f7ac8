"""Workers of GPUs whose tensors lie on the CPU, where nothing is under way when the next thing begins."""

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


class Stream:
    """Of streams and events, whatever they are asked to wait for has happened."""

    device = torch.device("cpu")

    def __init__(self, *_, **__): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def done(self, *_):
        return self

    wait = wait_stream = wait_event = record = record_event = synchronize = done

    def query(self) -> bool:
        return True


def without_streams() -> None:
    """For vLLM's own model runners, which use them, and pinned memory, and ask what a device has."""
    import vllm.v1.worker.gpu.buffer_utils as buffers
    from vllm.platforms import current_platform
    from vllm.utils import torch_utils
    from vllm.v1.worker import gpu_worker
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    torch.cuda.Stream = torch.cuda.Event = torch.Stream = torch.Event = Stream
    torch.cuda.current_stream = torch.accelerator.current_stream = Stream
    torch.cuda.stream = lambda stream: stream
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132, total_memory=MEMORY)
    for owner, names in (
        (torch.cuda, ("current_device", "set_stream", "is_current_stream_capturing")),
        (torch.accelerator, ("current_device_index", "set_device_index")),
    ):
        for name in names:
            setattr(owner, name, lambda *_, **__: 0)
    for name in ("zeros", "empty", "tensor", "full", "arange"):
        setattr(torch, name, not_pinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.Tensor.record_stream = lambda *_: None
    torch_utils._current_stream_tls.value = Stream()
    buffers.get_accelerator_view_from_cpu_tensor = lambda tensor: tensor
    platform = type(current_platform)
    platform.opaque_attention_op = classmethod(lambda _: False)  # graphs.py looks into it
    platform.device_type, platform.get_current_memory_usage = "cpu", classmethod(lambda *_, **__: 0)
    # of models that are not here, with packages that need not be; and kernels that the interpreter does not take
    gpu_worker.kernel_warmup = gpu_worker.warmup_kernels = GPUModelRunner._dummy_sampler_run = lambda *_: None


def not_pinned(make):
    return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)
