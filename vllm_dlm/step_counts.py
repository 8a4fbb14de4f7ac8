"""Counters of denoising, as an engine reports them."""

from dataclasses import dataclass, field

from vllm_dlm.client_cache import CacheUsage


@dataclass
class StepCounts:
    """Summed over the requests of the steps since the last report"""

    denoising_steps: int = 0
    canvas_positions: int = 0
    committed_tokens: int = 0
    rows_recomputed: int = 0
    rows_live: int = 0
    rows_dense: int = 0
    refresh_steps: int = 0
    kv_bytes_read: int = 0
    kv_bytes_dense: int = 0
    lowered_steps: int = 0
    caches: dict[str, CacheUsage] = field(default_factory=dict)  # of the engine, as of the last step; {}: no step
