"""Configures autoregressive models with a selection, and rejects what is not supported with one.

If the server names no selection, vLLM serves the model unchanged. If it names
one, the front-end checks the configuration and sets the worker; the rest is
in vllm_dlm/page_sparse. Read in vLLM 0.32 and 0.33: config/vllm.py
(`try_verify_and_update_config`, the only hook called for every model),
v1/core/sched/scheduler.py (`update_from_output`).
"""

from vllm_dlm.configuration import is_diffusion_lm, selection_of
from vllm_dlm.envelope import Envelope, with_envelope
from vllm_dlm.integration.registration import blamed, warn_of_unused_fields
from vllm_dlm.options import OptionError
from vllm_dlm.page_sparse.page_counts import COUNTS, PageCounts

WORKERS = {
    "cpu": "vllm_dlm.integration.worker.selecting_worker.SelectingCPUWorker",
    "cuda": "vllm_dlm.integration.worker.selecting_worker.SelectingGPUWorker",
}
#: methods of speculative decoding without their own attention
DRAFTLESS = ("ngram", "ngram_gpu", "suffix")


def try_verify_and_update_config(verify):
    def verify_with_dlm(self):
        verify(self)
        if self.model_config is not None and not is_diffusion_lm(self.model_config):
            configure(self)

    return verify_with_dlm


def update_from_output(update):
    def update_with_counts(self, scheduler_output, model_runner_output):
        outputs = update(self, scheduler_output, model_runner_output)
        if counts := getattr(model_runner_output, COUNTS, None):
            for output in outputs.values():
                if output.scheduler_stats is not None:
                    output.scheduler_stats = with_envelope(output.scheduler_stats, Envelope(pages=PageCounts(**counts)))
        return outputs

    return update_with_counts


def configure(vllm_config) -> None:
    """Called for every configuration of other models, possibly more than once."""
    try:
        selection = selection_of(vllm_config)
        if selection is None:
            warn_of_unused_fields(vllm_config)
            return
        refuse_model(vllm_config.model_config, selection)
        fit_blocks_to_pages(vllm_config.cache_config, selection)
    except OptionError as error:
        raise ValueError(blamed(vllm_config, error)) from None
    refuse_with_selection(vllm_config)

    from vllm.platforms import current_platform

    wanted = WORKERS["cpu" if current_platform.is_cpu() else "cuda"]
    parallel = vllm_config.parallel_config
    if parallel.worker_cls not in ("auto", wanted):
        raise ValueError(
            f"worker_cls: {parallel.worker_cls!r} cannot be used with dlm.selection, which requires {wanted!r}"
        )
    parallel.worker_cls = wanted
    vllm_config.model_config.dlm_selects = True  # see takes_options in requests.py


def refuse_model(model_config, selection) -> None:
    name, layers = model_config.architecture, model_config.get_total_num_hidden_layers()
    kinds = {
        "does not generate": model_config.runner_type != "generate",
        "has cross attention": model_config.is_encoder_decoder,
        "has latent attention (MLA)": model_config.use_mla,
        "mixes attention with state-space layers": model_config.is_hybrid,
        "has no attention": model_config.is_attention_free,
        "has bidirectional attention in parts of its prompt": model_config.is_mm_prefix_lm,
        "has windowed attention to its output": model_config.rswa_window is not None,
    }
    for kind, wrong in kinds.items():
        if wrong:
            raise OptionError("selection", f"dlm.selection: {name} {kind}, which is not supported")
    unknown = [layer for layer in selection.dense_layers if not isinstance(layer, int) or layer < 0]
    if unknown:
        raise OptionError("dense_layers", f"dlm.selection.dense_layers: {unknown[0]!r} is not the index of a layer")
    if set(range(layers)) <= set(selection.dense_layers):
        raise OptionError(
            "dense_layers",
            f"dlm.selection.dense_layers: all {layers} layers of {name} would read everything; leave some out",
        )


def fit_blocks_to_pages(cache_config, selection) -> None:
    """Makes the block size a multiple of the page size. (The CPU's default of 128 is one for all page sizes.)"""
    from vllm.platforms import current_platform

    size = selection.unit
    if cache_config.user_specified_block_size:
        if cache_config.block_size % size:
            raise OptionError(
                "page_size",
                f"dlm.selection.page_size: {size} does not divide block_size {cache_config.block_size}; "
                f"use a multiple of {size} as block_size, or another page_size",
            )
    elif not current_platform.is_cpu():
        # marked as set by the user, so that no backend replaces it by its preference
        cache_config.block_size, cache_config.user_specified_block_size = max(size, 16), True


def refuse_with_selection(vllm_config) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    speculation, backend = vllm_config.speculative_config, vllm_config.attention_config.backend
    refused = {
        "kv_cache_dtype": cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
        # transferred blocks have no summaries
        "kv_transfer_config": vllm_config.kv_transfer_config is not None,
        "kv_offloading_size": getattr(cache, "kv_offloading_size", None) is not None,
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "enable_dbo": parallel.enable_dbo,
        "attention_backend": backend is not None and backend.name not in ("CPU_ATTN", "FLASH_ATTN"),
        "speculative_config": speculation is not None and speculation.method not in DRAFTLESS,
    }
    for field, wrong in refused.items():
        if wrong:
            raise ValueError(f"{field}: not supported together with dlm.selection; start without one of them")
