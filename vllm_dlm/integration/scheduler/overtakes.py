"""Bounds how often a waiting request is overtaken."""

from collections import Counter
from collections.abc import Iterable

#: number of later requests that may overtake a request that waits for memory
OVERTAKES = 32


class Overtakes(Counter[str]):
    """Number of times that each waiting request was overtaken. After OVERTAKES times free memory is reserved for it, so
    it runs at the latest when all running requests have ended."""

    def exhausted(self, name: str) -> bool:
        return self[name] >= OVERTAKES

    def admitted(self, name: str, waiting: Iterable[str]) -> None:
        """Records that the request leaves the queue and overtakes all requests before it."""
        for ahead in waiting:
            if ahead == name:
                break
            self[ahead] += 1
        self.pop(name, None)
