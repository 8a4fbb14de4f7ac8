"""Caches whose keys a client chooses: each has a bound, evicts the least recently used entry, and is counted.

A cache keyed by anything a request may vary (a template, a policy field, a token) grows without limit unless it is
bounded. `CLIENT_CACHES` lists every such cache of the package with its bound; `tests/test_client_cache.py` checks that
each of them is used, stays within its bound and reaches the metrics.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import RLock
from typing import Generic, TypeVar
from weakref import WeakSet

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class CacheBound:
    entries: int
    key: str  # what a client varies


#: name -> bound; the names are the `cache` label of the metrics
CLIENT_CACHES = {
    "layouts": CacheBound(64, "dlm_template"),
    "alternatives": CacheBound(64, "the alternatives of a hole of a template"),
    "automata": CacheBound(64, "what a hole of a template may hold"),
}

_instances: dict[str, "WeakSet[ClientCache]"] = {}
_evictions: Counter[str] = Counter()


class ClientCache(Generic[K, V]):
    """Least-recently-used cache, of any threads. `on_evict` sees each value that leaves, so that it can release device
    memory."""

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
                _, evicted = self._values.popitem(last=False)
                _evictions[self.name] += 1
                if self.on_evict is not None:
                    self.on_evict(evicted)
            return value

    def pop(self, key: K) -> V | None:
        """Removes an entry without counting it as evicted."""
        return self._values.pop(key, None)

    def values(self) -> list[V]:
        return list(self._values.values())

    def clear(self) -> None:
        self._values.clear()


def cache_entries(name: str) -> int:
    """Entries of this process's caches of that name"""
    return sum(len(cache) for cache in _instances.get(name, ()))


def cache_evictions(name: str) -> int:
    """Entries that this process's caches of that name evicted so far"""
    return _evictions[name]
