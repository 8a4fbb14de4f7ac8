"""Metrics: vLLM's own `vllm:diffusion_*` counters, savings of reuse and selection policies, and bounded caches.

Engines report counts in the envelope of their statistics (envelope.py). `EnvelopeStatLogger` exports them in addition
to vLLM's own loggers, with the index of each engine as label. Read in vLLM 0.32 and 0.33: v1/metrics/loggers.py,
v1/spec_decode/metrics.py (counters that vLLM's own diffusion models use, too).
"""

from dataclasses import asdict

from vllm.logger import init_logger
from vllm.v1.metrics.loggers import (
    AggregateStatLoggerBase,
    LoggingStatLogger,
    PerEngineStatLoggerAdapter,
    PrometheusStatLogger,
)
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_dlm.client_cache import CLIENT_CACHES, FRONT_END, CacheUsage, usage
from vllm_dlm.configuration import is_diffusion_lm, selection_of
from vllm_dlm.envelope import envelope_in
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.step.counts import StepCounts

logger = init_logger("vllm." + __name__)

#: caches that the engine reports; caches of the front-end are counted when metrics are exported
ENGINE_CACHES = [name for name, bound in CLIENT_CACHES.items() if bound.process == "engine"]

#: counts without a name in vLLM; the first three fields of StepCounts are exported by its SpecDecodingProm
OWN_COUNTERS = {
    "rows_recomputed": ("vllm:diffusion_num_rows_recomputed", "Rows recomputed, averaged over the layers."),
    "rows_live": ("vllm:diffusion_num_rows_live", "Rows carried from embedding to head."),
    "rows_dense": ("vllm:diffusion_num_rows_dense", "Rows that full recomputation would have taken."),
    "refresh_steps": ("vllm:diffusion_num_refresh_steps", "Request steps that refreshed caches."),
    "kv_bytes_read": ("vllm:diffusion_kv_bytes_read", "Bytes of cached keys and values read (at two bytes each)."),
    "kv_bytes_dense": (
        "vllm:diffusion_kv_bytes_dense",
        "Bytes that the same steps would have read without a selection.",
    ),
    "lowered_steps": (
        "vllm:diffusion_num_lowered_steps",
        "Request steps with a lowered threshold because other requests were waiting.",
    ),
}


LABELS = ["model_name", "engine"]


def counters(logger: PrometheusStatLogger, table: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """field -> engine -> counter, from a table of names and descriptions"""
    return {
        field: create_metric_per_engine(logger._counter_cls(*described, LABELS), logger.per_engine_labelvalues)
        for field, described in table.items()
    }


class CachesProm:
    """Entries and evictions of every bounded cache. Caches of the front-end have the engine label "front-end"."""

    def __init__(self, logger: PrometheusStatLogger):
        labels = [*LABELS, "cache"]
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


def spec_decoding_stats(counts: StepCounts) -> SpecDecodingStats:
    """Counts for vLLM's own diffusion metrics"""
    return SpecDecodingStats(0, counts.denoising_steps, counts.canvas_positions, counts.committed_tokens)


class DiffusionProm:
    """Counters of denoising: vLLM's own diffusion counters, and ours"""

    def __init__(self, logger: PrometheusStatLogger):
        self.vllm = logger._spec_decoding_cls(None, LABELS, logger.per_engine_labelvalues, is_diffusion=True)
        self.own = counters(logger, OWN_COUNTERS)
        self.caches = CachesProm(logger)

    def observe(self, counts: StepCounts, engine_idx: int) -> None:
        self.vllm.observe(spec_decoding_stats(counts), engine_idx)
        self.caches.observe(counts.caches, engine_idx)
        for name, engines in self.own.items():
            engines[engine_idx].inc(getattr(counts, name))


#: counts of autoregressive models with a selection, see PageCounts in page_sparse/page_counts.py
PAGE_COUNTERS = {
    "sparse_rows": ("vllm:sparse_attention_rows", "Generated positions that read selected pages, times layers."),
    "dense_rows": ("vllm:sparse_attention_dense_rows", "Generated positions that read everything, times layers."),
    "pages_read": ("vllm:sparse_attention_pages_read", "Pages of the KV cache read by generated positions."),
    "pages_seen": ("vllm:sparse_attention_pages_dense", "Pages that dense attention would have read."),
}


class PagesProm:
    """Counters of page-sparse attention"""

    def __init__(self, logger: PrometheusStatLogger):
        self.counters = counters(logger, PAGE_COUNTERS)

    def observe(self, counts: PageCounts, engine_idx: int) -> None:
        for name, count in asdict(counts).items():
            self.counters[name][engine_idx].inc(count)


class PagesLogging:
    """One log line per interval with decoded tokens, summed over the engines"""

    def __init__(self) -> None:
        self.total = PageCounts()

    def observe(self, counts: PageCounts) -> None:
        self.total.add(counts)

    def log(self, log_fn=logger.info) -> None:
        total, self.total = self.total, PageCounts()
        if total.pages_seen:
            rows = total.sparse_rows + total.dense_rows
            pages, sparse = 100 * total.pages_read / total.pages_seen, 100 * total.sparse_rows / rows
            log_fn("Sparse attention: %.1f%% of the pages read, %.1f%% of the rows sparse", pages, sparse)


class EnvelopeStatLogger(AggregateStatLoggerBase):
    """Logs and exports the counts of envelopes. One instance for all engines of a front-end"""

    def __init__(self, vllm_config, engine_indexes: list[int], exporter: PrometheusStatLogger, logs: bool):
        """`exporter`: vLLM's, for classes and labels of metrics; `logs`: whether vLLM writes log lines"""
        diffusion = is_diffusion_lm(vllm_config.model_config)
        self.diffusion = DiffusionProm(exporter) if diffusion else None
        self.pages = PagesProm(exporter) if not diffusion else None
        self.diffusion_log = SpecDecodingLogging(is_diffusion=True) if logs and diffusion else None
        self.pages_log = PagesLogging() if logs and not diffusion else None

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx: int = 0) -> None:
        if (envelope := envelope_in(scheduler_stats)) is None:
            return
        if (steps := envelope.steps) is not None and self.diffusion is not None:
            self.diffusion.observe(steps, engine_idx)
            if self.diffusion_log is not None:
                self.diffusion_log.observe(spec_decoding_stats(steps))
        if (pages := envelope.pages) is not None and self.pages is not None:
            self.pages.observe(pages, engine_idx)
            if self.pages_log is not None:
                self.pages_log.observe(pages)

    def log(self) -> None:
        for own in (self.diffusion_log, self.pages_log):
            if own is not None:
                own.log(log_fn=logger.info)

    def log_engine_initialized(self) -> None: ...


def stat_loggers(init):
    def init_with_dlm(self, vllm_config, *args, **kwargs):
        init(self, vllm_config, *args, **kwargs)
        if is_diffusion_lm(vllm_config.model_config) or selection_of(vllm_config) is not None:
            exporter = next(each for each in self.stat_loggers if isinstance(each, PrometheusStatLogger))
            logs = any(map(writes_log, self.stat_loggers))
            self.stat_loggers.append(EnvelopeStatLogger(vllm_config, self.engine_indexes, exporter, logs))

    return init_with_dlm


def writes_log(stat_logger: AggregateStatLoggerBase) -> bool:
    """Whether it is a logger of vLLM that writes log lines"""
    if isinstance(stat_logger, PerEngineStatLoggerAdapter):
        return any(isinstance(each, LoggingStatLogger) for each in stat_logger.per_engine_stat_loggers.values())
    return isinstance(stat_logger, LoggingStatLogger)
