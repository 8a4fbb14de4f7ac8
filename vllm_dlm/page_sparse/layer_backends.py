"""Gives vLLM's attention layers the backend that chooses pages, if the server has a selection.

Read in vLLM 0.32 and 0.33: model_executor/layers/attention/attention.py
(`Attention` uses a given `attn_backend` without checks, but its name must be
registered), v1/attention/backends/registry.py.
"""

import inspect

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_dlm.configuration import selection_of

BACKENDS = {
    "DLM_SELECTING_CPU": "vllm_dlm.page_sparse.cpu.SelectingCPUBackend",
    "DLM_SELECTING_FLASH": "vllm_dlm.page_sparse.cuda.SelectingFlashBackend",
}


def install() -> None:
    for name, path in BACKENDS.items():
        if name not in AttentionBackendEnum.__members__:
            AttentionBackendEnum.register(name, path)


def with_selection(init):
    """Wraps `Attention.__init__`."""
    signature = inspect.signature(init)

    def init_with_dlm(self, *args, **kwargs):
        selection = selection_of(get_current_vllm_config())
        if selection is None:
            return init(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        chooses = wants_selection(given.arguments, selection)
        if chooses:
            refuse(given.arguments)
            chosen = given.arguments["attn_backend"] = backend()
            refuse_kernel(chosen, given.arguments, torch.get_default_dtype(), current_platform.get_device_capability())
        init(*given.args, **given.kwargs)
        if chooses:
            if is_quantized_kv_cache(self.kv_cache_dtype):
                raise unsupported(self.layer_name, "kv_cache_dtype", self.kv_cache_dtype)
            self.impl.selection = selection

    return init_with_dlm


def backend() -> type:
    name = "DLM_SELECTING_CPU" if current_platform.is_cpu() else "DLM_SELECTING_FLASH"
    return AttentionBackendEnum[name].get_class()


def wants_selection(given: dict, selection) -> bool:
    """Whether a layer gets the selecting backend. Layers with a sliding window, and layers for which the model sets a
    backend, are left unchanged."""
    if given["attn_backend"] is not None or given["attn_type"] != AttentionType.DECODER:
        return False
    window = given["per_layer_sliding_window"]
    if window is None and given["cache_config"] is not None:
        window = given["cache_config"].sliding_window
    return window is None and not selection.sees_all(extract_layer_index(given["prefix"]))


def refuse(given: dict) -> None:
    """Rejects arguments that the page kernels do not support. (A soft cap of 0 means none.)"""
    for name in ("alibi_slopes", "use_alibi_sqrt", "logits_soft_cap"):
        if given[name]:
            raise unsupported(given["prefix"], name, given[name])
    if given["head_size_v"] not in (None, given["head_size"]):
        raise unsupported(given["prefix"], "head_size_v", given["head_size_v"])
    for name, value in given["extra_impl_args"].items():
        if value is not None:
            raise unsupported(given["prefix"], name, "given" if hasattr(value, "shape") else value)


def refuse_kernel(chosen: type[AttentionBackend], given: dict, dtype: torch.dtype, capability) -> None:
    """Applies the checks that vLLM makes for backends it selects itself. `capability`: of the device, None on CPUs."""
    layer, size = given["prefix"], given["head_size"]
    if not chosen.supports_dtype(dtype):
        listed = " or ".join(str(known).removeprefix("torch.") for known in chosen.supported_dtypes)
        raise unsupported(layer, "dtype", str(dtype).removeprefix("torch."), f"give {listed} as dtype, or ")
    if not chosen.supports_head_size(size):
        raise unsupported(layer, "head_size", size)
    if capability is not None and not chosen.supports_compute_capability(capability):
        raise unsupported(layer, "compute capability", capability.as_version_str())


def unsupported(layer: str, name: str, value, instead: str = "") -> ValueError:
    return ValueError(
        f"dlm.selection: attention of {layer} has {name} ({value}), which page-sparse attention does not support; "
        f"{instead}start without dlm.selection"
    )
