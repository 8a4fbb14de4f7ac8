"""Counters of denoising that an engine reports."""

from dataclasses import dataclass, field

from vllm_dlm.client_cache import CacheUsage


@dataclass
class StepCounts:
    """Sums over all requests and steps since the last report"""

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
    caches: dict[str, CacheUsage] = field(default_factory=dict)  # caches of the engine after the last step; {}: no step
