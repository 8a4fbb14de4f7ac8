"""How often a waiting request may be overtaken."""

from collections import Counter
from collections.abc import Iterable

#: number of later requests that may overtake one that waits for memory; then all of them wait with it
OVERTAKES = 32


class Overtakes(Counter[str]):
    """How often each waiting request was overtaken. After OVERTAKES times free memory is kept for it, so that it runs
    at the latest when the running requests have ended."""

    def exhausted(self, name: str) -> bool:
        return self[name] >= OVERTAKES

    def admitted(self, name: str, waiting: Iterable[str]) -> None:
        """The request leaves the queue: those before it are overtaken."""
        for ahead in waiting:
            if ahead == name:
                break
            self[ahead] += 1
        self.pop(name, None)
