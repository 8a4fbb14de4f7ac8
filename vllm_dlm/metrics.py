"""Counters: vLLM's own `vllm:diffusion_*` names, and what the reuse and selection policies saved.

The engine counts, the front-end exports. Between them the counts travel in
vLLM's SpecDecodingStats, which diffusion models reuse there too (read in vLLM
0.32 and 0.33: v1/spec_decode/metrics.py, v1/metrics/loggers.py).
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_dlm.integration.autoregressive import COUNTS, selection_of
from vllm_dlm.integration.registration import is_diffusion_lm

logger = init_logger("vllm." + __name__)


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
    lowered_steps: int = 0

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
    "lowered_steps": ("vllm:diffusion_num_lowered_steps", "Steps of a request with a lower threshold, as others wait."),
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


#: of autoregressive models that decode with a selection; see PageCounts in page_sparse/page_counts.py
PAGE_COUNTERS = {
    "sparse_rows": ("vllm:sparse_attention_rows", "Generated positions that read chosen pages, times layers."),
    "dense_rows": ("vllm:sparse_attention_dense_rows", "Generated positions that read everything, times layers."),
    "pages_read": ("vllm:sparse_attention_pages_read", "Pages of the KV cache read by generated positions."),
    "pages_seen": ("vllm:sparse_attention_pages_dense", "Pages that dense attention would have read."),
}


class PagesProm:
    """In the place of a PrometheusStatLogger's KVConnectorProm, whose statistics carry the counts."""

    def __init__(self, logger: PrometheusStatLogger):
        labels, values = ["model_name", "engine"], logger.per_engine_labelvalues
        self.counters = {
            field: create_metric_per_engine(logger._counter_cls(name, documentation, labels), values)
            for field, (name, documentation) in PAGE_COUNTERS.items()
        }

    def observe(self, stats: dict, engine_idx: int = 0) -> None:
        for field, count in stats[COUNTS].items():
            self.counters[field][engine_idx].inc(count)


class PagesLogging:
    """Likewise of a LoggingStatLogger: a line per interval in which something was decoded."""

    def __init__(self, _logger: LoggingStatLogger):
        self.totals = dict.fromkeys(PAGE_COUNTERS, 0)

    def observe(self, stats: dict) -> None:
        for field, count in stats[COUNTS].items():
            self.totals[field] += count

    def log(self, log_fn=logger.info) -> None:
        if seen := self.totals["pages_seen"]:
            rows = self.totals["sparse_rows"] + self.totals["dense_rows"]
            log_fn(
                "Sparse attention: %.1f%% of the pages read, %.1f%% of the rows sparse",
                100 * self.totals["pages_read"] / seen, 100 * self.totals["sparse_rows"] / rows,
            )  # fmt: skip
        self.totals = dict.fromkeys(PAGE_COUNTERS, 0)


def _diffusion(vllm_config) -> bool:
    return is_diffusion_lm(vllm_config.model_config)


def _chooses(vllm_config) -> bool:
    return selection_of(vllm_config) is not None


def logging_init(init):
    return _then(
        init,
        (_diffusion, "spec_decoding_logging", lambda _: SpecDecodingLogging(is_diffusion=True)),
        (_chooses, "kv_connector_logging", PagesLogging),
    )


def prometheus_init(init):
    return _then(init, (_diffusion, "spec_decoding_prom", DiffusionProm), (_chooses, "kv_connector_prom", PagesProm))


def _then(init, *replacements: tuple[Callable, str, Callable]):
    """`init`, and after it: (for which configurations, attribute, what makes it of the logger)"""

    def init_with_dlm(self, vllm_config, *args, **kwargs):
        init(self, vllm_config, *args, **kwargs)
        for applies, attribute, make in replacements:
            if applies(vllm_config):
                setattr(self, attribute, make(self))

    return init_with_dlm
