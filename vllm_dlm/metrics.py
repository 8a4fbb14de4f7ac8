"""Counters: vLLM's own `vllm:diffusion_*` names, and what the reuse and selection policies saved.

The engine counts, the front-end exports. Between them the counts travel in
vLLM's SpecDecodingStats, which diffusion models reuse there too (read in vLLM
0.32: v1/spec_decode/metrics.py, v1/metrics/loggers.py).
"""

from dataclasses import astuple, dataclass, fields

import prometheus_client
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_dlm.integration.registration import is_diffusion_lm


@dataclass
class StepCounts:
    """Summed over the requests of the steps since the last report."""

    denoising_steps: int = 0
    canvas_positions: int = 0
    committed_tokens: int = 0
    rows_recomputed: int = 0

    def pack(self) -> SpecDecodingStats:
        first = (self.denoising_steps, self.canvas_positions, self.committed_tokens)
        return SpecDecodingStats(0, *first, num_accepted_tokens_per_pos=list(astuple(self)[3:]))

    @classmethod
    def unpack(cls, stats: SpecDecodingStats) -> "StepCounts":
        first = (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens)
        return cls(*first, *stats.num_accepted_tokens_per_pos)


COUNTERS = {
    "denoising_steps": ("vllm:diffusion_num_denoising_steps", "Denoising steps, a block's commit counted as one."),
    "canvas_positions": ("vllm:diffusion_num_canvas_positions", "Positions of the current block, summed over steps."),
    "committed_tokens": ("vllm:diffusion_num_committed_tokens", "Tokens delivered."),
    "rows_recomputed": ("vllm:diffusion_num_rows_recomputed", "Rows that went through the model."),
}


class DiffusionStatLogger(StatLoggerBase):
    """Entry point of the group `vllm.stat_logger_plugins`; one per engine in the API server."""

    def __init__(self, vllm_config, engine_index: int = 0):
        self.active = is_diffusion_lm(vllm_config.model_config)
        if not self.active:
            return
        labels = {"model_name": vllm_config.model_config.served_model_name, "engine": str(engine_index)}
        self.counters = {
            field.name: counter(*COUNTERS[field.name], tuple(labels)).labels(**labels) for field in fields(StepCounts)
        }

    def record(self, scheduler_stats=None, iteration_stats=None, mm_cache_stats=None, engine_idx: int = 0):
        if not self.active or scheduler_stats is None or scheduler_stats.spec_decoding_stats is None:
            return
        counts = StepCounts.unpack(scheduler_stats.spec_decoding_stats)
        for name, child in self.counters.items():
            child.inc(getattr(counts, name))

    def log_engine_initialized(self):
        pass


_created: dict[str, prometheus_client.Counter] = {}


def counter(name: str, documentation: str, labels: tuple[str, ...]) -> prometheus_client.Counter:
    """One collector per name and process; vLLM unregisters its collectors when an engine is made anew."""
    collector = _created.get(name)
    if collector is None or collector not in prometheus_client.REGISTRY._collector_to_names:
        collector = _created[name] = prometheus_client.Counter(name, documentation, labels)
    return collector


def install() -> None:
    """vLLM's log line: diffusion's words instead of speculative decoding's."""
    from vllm.v1.metrics.loggers import LoggingStatLogger

    if getattr(LoggingStatLogger.__init__, "_dlm", False):
        return
    init = LoggingStatLogger.__init__

    def init_with_dlm(self, vllm_config, *args, **kwargs):
        init(self, vllm_config, *args, **kwargs)
        if is_diffusion_lm(vllm_config.model_config):
            self.spec_decoding_logging = SpecDecodingLogging(is_diffusion=True)

    init_with_dlm._dlm = True
    LoggingStatLogger.__init__ = init_with_dlm
