"""Every cache that a client can key is listed, bounded, evicted and reported."""

import ast
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

import vllm_dlm
from vllm_dlm.client_cache import CLIENT_CACHES, ENGINE, FRONT_END, CacheUsage, ClientCache, usage
from vllm_dlm.envelope import Envelope, EnvelopeOutputs, with_envelope
from vllm_dlm.metrics import ENGINE_CACHES, CachesProm
from vllm_dlm.step.counts import StepCounts

ROOT = Path(vllm_dlm.__file__).parent
#: path within the package -> syntax tree; `plugins` and `kernels` are links, which `os.walk` follows on request
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder, _, names in os.walk(ROOT, followlinks=True)
    for path in map(Path(folder).joinpath, names)
    if path.suffix == ".py"
}

#: functions with an unbounded `functools.cache` -> what keys it
NOT_KEYED_BY_CLIENTS = {
    "methods.py:methods": "the four kinds of methods",
    "options/types.py:_adapter": "fields of the registered dataclasses",
    "view/page.py:page": "nothing",
    "view/page.py:script": "nothing",
    "view/page.py:policy": "nothing",
    "step/attention.py:installed": "nothing",
    "kernels/triton_utils.py:processors": "devices of the machine",
    "step/attention.py:_version": "nothing",
    "step/head.py:numeric_fields": "the registered decodings",
}


def constructed() -> set[str]:
    """Names of the caches that the package makes"""
    return {
        call.args[0].value
        for tree in SOURCES.values()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript | ast.Name)
        and "ClientCache" in ast.dump(call.func)
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }


def test_every_listed_cache_is_made_and_every_cache_made_is_listed():
    assert constructed() == set(CLIENT_CACHES)


def test_unbounded_caches_of_functions_are_not_keyed_by_clients():
    found = {
        f"{name}:{function.name}"
        for name, tree in SOURCES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for decorator in function.decorator_list
        if unbounded(decorator)
    }
    assert found == set(NOT_KEYED_BY_CLIENTS)


def unbounded(decorator: ast.expr) -> bool:
    """`cache`, and `lru_cache` without a bound"""
    written = ast.unparse(decorator)
    return written.split(".")[-1] == "cache" or ("lru_cache" in written and "maxsize=None" in written)


@pytest.mark.parametrize("name", CLIENT_CACHES)
def test_a_cache_stays_within_its_bound(name):
    evicted: list[int] = []
    cache = ClientCache[int, int](name, evicted.append)
    bound, process = CLIENT_CACHES[name].entries, CLIENT_CACHES[name].process
    before = usage(process)[name]
    for key in range(bound):
        cache.put(key, -key)
    assert cache.get(0) == 0  # now the most recently used
    for key in range(bound, bound + 3):
        cache.put(key, -key)
    assert len(cache) == bound and 0 in cache and evicted == [-1, -2, -3]
    after = usage(process)[name]
    assert after == CacheUsage(before.entries + bound, before.evictions + 3)
    assert cache.pop(0) == 0 and cache.pop(0) is None and cache.get(0) is None
    del cache
    assert usage(process)[name].entries == before.entries


def test_every_cache_belongs_to_one_process():
    assert usage(ENGINE).keys() | usage(FRONT_END).keys() == CLIENT_CACHES.keys()


def test_usage_of_the_engine_travels_with_the_counters():
    caches = {name: CacheUsage(3 * index, index) for index, name in enumerate(ENGINE_CACHES)}
    for counts in (
        StepCounts(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, caches),
        StepCounts(),
    ):  # and no step since the last report
        sent = EngineCoreOutputs(scheduler_stats=with_envelope(SchedulerStats(), Envelope(steps=counts)))
        received = MsgpackDecoder(EnvelopeOutputs).decode(MsgpackEncoder().encode(sent))
        assert received.scheduler_stats.dlm.steps == counts


def test_evictions_are_exported_as_differences():
    registry = CollectorRegistry()  # the process has one for a server, and a test of its metrics may have filled it
    labels = SimpleNamespace(
        per_engine_labelvalues={0: ["model", "0"]},
        _gauge_cls=partial(Gauge, registry=registry),
        _counter_cls=partial(Counter, registry=registry),
    )
    exported = CachesProm(labels)
    name = ENGINE_CACHES[0]

    def sample(metric: str) -> float:
        return registry.get_sample_value(metric, {"model_name": "model", "engine": "0", "cache": name})

    assert sample("vllm:diffusion_cache_evictions_total") == 0  # it is there from the start
    for reported, evictions in (({name: CacheUsage(5, 3)}, 3), ({}, 3), ({name: CacheUsage(2, 4)}, 4)):
        exported.observe(reported, 0)
        assert sample("vllm:diffusion_cache_evictions_total") == evictions
    assert sample("vllm:diffusion_cache_entries") == 2
