"""A process that believes it has one H200."""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import torch

LIBRARIES = ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C")
MEMORY = 141 << 30


def pretend() -> None:
    if "vllm" in sys.modules:
        raise RuntimeError("too late: vLLM has looked for its platform")
    for name in LIBRARIES:
        sys.modules[name] = ModuleType(name)
    _without_a_trace_of_the_cpu_wheel()
    _management_library()
    _compiler()
    _torch()
    from vllm.platforms import current_platform

    # vLLM's operators in Python take tensors of the CPU, too
    type(current_platform).dispatch_key = "CPU"


def _without_a_trace_of_the_cpu_wheel() -> None:
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: version(name).removesuffix("+cpu")


def _management_library() -> None:
    import vllm.third_party.pynvml as nvml

    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetName": "NVIDIA H200",
        "nvmlDeviceGetUUID": "GPU-pretended",
        "nvmlSystemGetDriverVersion": "580.0",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=MEMORY, free=MEMORY, used=0),
    }
    for name, answer in answers.items():
        setattr(nvml, name, lambda *_, answer=answer, **__: answer)


def _compiler() -> None:
    """vLLM defines its Triton kernels as if they could be launched; those that a part launches it replaces."""
    from triton.backends.nvidia.driver import CudaDriver

    CudaDriver.is_active = staticmethod(lambda: True)


def _torch() -> None:
    """Questions about a device that vLLM asks outside of operators."""
    for name in ("synchronize", "empty_cache", "empty_host_cache", "reset_peak_memory_stats"):
        setattr(torch.accelerator, name, lambda *_, **__: None)
    torch.accelerator.max_memory_allocated = lambda *_: 0
    torch.accelerator.get_memory_info = lambda *_: (MEMORY, MEMORY)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.memory.get_allocator_backend = lambda: "native"
    torch._C._accelerator_getAllocatorSettings = lambda: ""
    torch._C._accelerator_setAllocatorSettings = lambda settings: None
