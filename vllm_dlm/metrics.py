"""Counters: vLLM's own `vllm:diffusion_*` names, and what the reuse and selection policies saved.

The engine counts, the front-end exports. Between them the counts travel in
vLLM's SpecDecodingStats, which diffusion models reuse there too (read in vLLM
0.32: v1/spec_decode/metrics.py, v1/metrics/loggers.py).
"""

import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass

from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_dlm.integration.registration import is_diffusion_lm


@dataclass
class StepCounts:
    """Summed over the requests of the steps since the last report."""

    denoising_steps: int = 0
    canvas_positions: int = 0
    committed_tokens: int = 0
    rows_recomputed: int = 0
    rows_live: int = 0
    rows_dense: int = 0
    refresh_steps: int = 0
    kv_bytes_read: int = 0
    kv_bytes_dense: int = 0

    def pack(self) -> SpecDecodingStats:
        first = (self.denoising_steps, self.canvas_positions, self.committed_tokens)
        return SpecDecodingStats(0, *first, num_accepted_tokens_per_pos=list(astuple(self)[3:]))

    @classmethod
    def unpack(cls, stats: SpecDecodingStats) -> "StepCounts":
        first = (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens)
        return cls(*first, *stats.num_accepted_tokens_per_pos)


#: what vLLM has no name for; the first three fields are exported by its own SpecDecodingProm
OWN_COUNTERS = {
    "rows_recomputed": ("vllm:diffusion_num_rows_recomputed", "Rows recomputed, averaged over the layers."),
    "rows_live": ("vllm:diffusion_num_rows_live", "Rows carried from embedding to head."),
    "rows_dense": ("vllm:diffusion_num_rows_dense", "Rows that recomputing everything would have taken."),
    "refresh_steps": ("vllm:diffusion_num_refresh_steps", "Steps of a request that refreshed its caches."),
    "kv_bytes_read": ("vllm:diffusion_kv_bytes_read", "Bytes of cached keys and values read (at two bytes each)."),
    "kv_bytes_dense": ("vllm:diffusion_kv_bytes_dense", "Bytes that the same steps had read without a selection."),
}


class DiffusionProm:
    """In the place of a PrometheusStatLogger's SpecDecodingProm: vLLM's counters under diffusion's names, and ours."""

    def __init__(self, logger: PrometheusStatLogger):
        labels, values = ["model_name", "engine"], logger.per_engine_labelvalues
        self.vllm = logger._spec_decoding_cls(None, labels, values, is_diffusion=True)
        self.own = {
            field: create_metric_per_engine(logger._counter_cls(name, documentation, labels), values)
            for field, (name, documentation) in OWN_COUNTERS.items()
        }

    def observe(self, stats: SpecDecodingStats, engine_idx: int = 0) -> None:
        self.vllm.observe(stats, engine_idx)
        counts = StepCounts.unpack(stats)
        for field, engines in self.own.items():
            engines[engine_idx].inc(getattr(counts, field))


def install() -> None:
    """vLLM decides by the model's `canvas_length`, which these models do not have, whether its log line and
    its counters speak of diffusion; both are told so after they are made."""
    _after_init(LoggingStatLogger, "spec_decoding_logging", lambda _: SpecDecodingLogging(is_diffusion=True))
    _after_init(PrometheusStatLogger, "spec_decoding_prom", DiffusionProm)


def _after_init(cls: type, attribute: str, make: Callable) -> None:
    init = cls.__init__
    if getattr(init, "_dlm", False):
        return

    @functools.wraps(init)
    def init_with_dlm(self, vllm_config, *args, **kwargs):
        init(self, vllm_config, *args, **kwargs)
        if is_diffusion_lm(vllm_config.model_config):
            setattr(self, attribute, make(self))

    init_with_dlm._dlm = True
    cls.__init__ = init_with_dlm
