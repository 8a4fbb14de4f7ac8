"""Bounded least-recently-used caches for keys that clients choose, with metrics.

Without a bound, a cache keyed by anything that a request can vary (a template, a policy field, a token) would grow
without limit. `CLIENT_CACHES` lists every such cache with its bound. `tests/test_client_cache.py` checks that each is
used, stays within its bound and appears in the metrics.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import RLock
from typing import Generic, Literal, NamedTuple, TypeVar
from weakref import WeakSet

K = TypeVar("K")
V = TypeVar("V")
Process = Literal["front-end", "engine"]
FRONT_END: Process = "front-end"
ENGINE: Process = "engine"


@dataclass(frozen=True)
class CacheBound:
    entries: int
    key: str  # description of the key
    process: Process  # process that has the cache and reports it


#: name -> bound; the names are the `cache` label of the metrics
CLIENT_CACHES = {
    "layouts": CacheBound(64, "dlm_template", FRONT_END),
    "alternatives": CacheBound(64, "the alternatives of a hole of a template", FRONT_END),
    "automata": CacheBound(64, "the valid contents of a hole of a template", ENGINE),
    "choice_pools": CacheBound(256, "the selection and its preset", ENGINE),
    "captured_steps": CacheBound(128, "the reuse policy and its preset; rows and canvases of a step", ENGINE),
    "seen_steps": CacheBound(1024, "the reuse policy and its preset; rows and canvases of a step", ENGINE),
    "refused_steps": CacheBound(256, "the reuse policy and its preset", ENGINE),
    "texts": CacheBound(1 << 16, "a token of a prompt or an answer, for the live view", FRONT_END),
    "followers": CacheBound(64, "a connection to the live view (limits.followers)", FRONT_END),
}

_instances: dict[str, "WeakSet[ClientCache]"] = {}
_evictions: Counter[str] = Counter()


class ClientCache(Generic[K, V]):
    """Thread-safe least-recently-used cache. `on_evict` is called with each evicted value, for example to release
    device memory."""

    def __init__(self, name: str, on_evict: Callable[[V], None] | None = None, entries: int | None = None):
        self.name, self.on_evict = name, on_evict
        self.bound = CLIENT_CACHES[name].entries if entries is None else entries
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = RLock()
        _instances.setdefault(name, WeakSet()).add(self)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[K]:
        return iter(self._values)

    def get(self, key: K) -> V | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: K, value: V) -> V:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self.bound:
                self.evict()
            return value

    def evict(self, key: K | None = None) -> None:
        """Removes an entry, by default the least recently used one."""
        with self._lock:
            evicted = self._values.pop(next(iter(self._values)) if key is None else key)
            _evictions[self.name] += 1
        if self.on_evict is not None:
            self.on_evict(evicted)

    def pop(self, key: K) -> V | None:
        """Removes an entry without counting it as evicted."""
        return self._values.pop(key, None)

    def values(self) -> list[V]:
        return list(self._values.values())

    def clear(self) -> None:
        self._values.clear()


class CacheUsage(NamedTuple):
    """Summed over the caches of one name in one process."""

    entries: int = 0
    evictions: int = 0  # since the process started


def usage(process: Process) -> dict[str, CacheUsage]:
    """Usage of every listed cache of `process`, called in that process"""
    return {
        name: CacheUsage(sum(map(len, _instances.get(name, ()))), _evictions[name])
        for name, bound in CLIENT_CACHES.items()
        if bound.process == process
    }
