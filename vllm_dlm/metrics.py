"""Metrics: vLLM's own `vllm:diffusion_*` counters, what reuse and selection policies saved, and bounded caches.

The engine counts and the front-end exports. The counts travel in vLLM's SpecDecodingStats, which vLLM's own diffusion
models use as well (read in vLLM 0.32 and 0.33: v1/spec_decode/metrics.py, v1/metrics/loggers.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_dlm.client_cache import CLIENT_CACHES, FRONT_END, CacheUsage, usage
from vllm_dlm.configuration import is_diffusion_lm, selection_of
from vllm_dlm.page_sparse.page_counts import COUNTS

logger = init_logger("vllm." + __name__)

#: caches that the engine reports; those of the front-end are counted where they are exported
ENGINE_CACHES = [name for name, bound in CLIENT_CACHES.items() if bound.process == "engine"]


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
    caches: dict[str, CacheUsage] = field(default_factory=dict)  # of the engine, as of the last step; {}: no step

    def pack(self) -> SpecDecodingStats:
        *counts, _ = (getattr(self, each.name) for each in fields(self))
        caches = [number for name in ENGINE_CACHES for number in self.caches[name]] if self.caches else []
        return SpecDecodingStats(0, *counts[:3], num_accepted_tokens_per_pos=[*counts[3:], *caches])

    @classmethod
    def unpack(cls, stats: SpecDecodingStats) -> "StepCounts":
        packed = stats.num_accepted_tokens_per_pos
        counts, caches = packed[: len(OWN_COUNTERS)], packed[len(OWN_COUNTERS) :]
        pairs = zip(caches[::2], caches[1::2], strict=True)
        of_caches = dict(zip(ENGINE_CACHES, map(CacheUsage._make, pairs), strict=bool(caches)))
        first = (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens)
        return replace(cls(*first, *counts), caches=of_caches)


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


class CachesProm:
    """Entries and evictions of every cache that clients can key. Those of the front-end have the engine "front-end"."""

    def __init__(self, logger: PrometheusStatLogger):
        labels = ["model_name", "engine", "cache"]
        self.entries = logger._gauge_cls(
            "vllm:diffusion_cache_entries", "Entries of a bounded cache.", labels, multiprocess_mode="mostrecent"
        )
        self.evictions = logger._counter_cls(
            "vllm:diffusion_cache_evictions", "Entries that a bounded cache evicted.", labels
        )
        self.model_name = next(iter(logger.per_engine_labelvalues.values()))[0]
        self.evicted: dict[tuple[str, str], int] = {}
        for engine in logger.per_engine_labelvalues:
            self.observe(dict.fromkeys(ENGINE_CACHES, CacheUsage()), engine)

    def observe(self, engine_caches: dict[str, CacheUsage], engine_idx: int) -> None:
        for engine, caches in ((str(engine_idx), engine_caches), (FRONT_END, usage(FRONT_END))):
            for name, (entries, evictions) in caches.items():
                self.entries.labels(self.model_name, engine, name).set(entries)
                new = max(evictions - self.evicted.get((engine, name), 0), 0)
                self.evictions.labels(self.model_name, engine, name).inc(new)
                self.evicted[engine, name] = evictions


class DiffusionProm:
    """Replaces a PrometheusStatLogger's SpecDecodingProm: vLLM's counters under diffusion's names, and ours."""

    def __init__(self, logger: PrometheusStatLogger):
        labels, values = ["model_name", "engine"], logger.per_engine_labelvalues
        self.vllm = logger._spec_decoding_cls(None, labels, values, is_diffusion=True)
        self.own = {
            field: create_metric_per_engine(logger._counter_cls(name, documentation, labels), values)
            for field, (name, documentation) in OWN_COUNTERS.items()
        }
        self.caches = CachesProm(logger)

    def observe(self, stats: SpecDecodingStats, engine_idx: int = 0) -> None:
        self.vllm.observe(stats, engine_idx)
        counts = StepCounts.unpack(stats)
        self.caches.observe(counts.caches, engine_idx)
        for name, engines in self.own.items():
            engines[engine_idx].inc(getattr(counts, name))


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
        for name, count in stats[COUNTS].items():
            self.counters[name][engine_idx].inc(count)


class PagesLogging:
    """Likewise of a LoggingStatLogger: a line per interval in which something was decoded."""

    def __init__(self, _logger: LoggingStatLogger):
        self.totals = dict.fromkeys(PAGE_COUNTERS, 0)

    def observe(self, stats: dict) -> None:
        for name, count in stats[COUNTS].items():
            self.totals[name] += count

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
