"""Selects the refreshes that run in a step of the engine."""

from collections import Counter
from collections.abc import Iterable

from vllm_dlm.canvas.canvas import Canvas

#: maximum share of its own steps for which a request waits for refreshes of others
HELD_BACK = 0.1


class RefreshStagger:
    """Spreads refreshes, which are expensive and periodic, evenly over the steps of the engine.

    A request with a due refresh waits while others refresh, for at most HELD_BACK of its own steps, unless its policy
    disables this. Results do not depend on it."""

    def __init__(self) -> None:
        self.refreshed: Counter[str] = Counter()  # number of refreshes of each running request
        self.held: Counter[str] = Counter()  # number of steps for which each was held back
        self.left = 0  # number of refreshes that may still run in this step

    def begin(self, running: Iterable[tuple[str, Canvas]]) -> None:
        """Begins a step of the engine. Allows enough refreshes to keep up with those that become due."""
        requests = list(running)
        steps = sum(canvas.step for _, canvas in requests)
        made = sum(self.refreshed[name] for name, _ in requests)
        self.left = -(-len(requests) * made // steps) if steps else len(requests)

    def holds_back(self, name: str, canvas: Canvas) -> bool:
        """Whether the request waits in this step; counts the waits."""
        if not canvas.plan.refresh or self.left > 0 or not canvas.options.reuse.stagger:
            return False
        if self.held[name] >= int(HELD_BACK * canvas.step):
            return False
        self.held[name] += 1
        return True

    def ran(self, name: str, canvas: Canvas) -> None:
        self.refreshed[name] += canvas.plan.refresh
        self.left -= canvas.plan.refresh

    def forget(self, name: str) -> None:
        self.refreshed.pop(name, None)
        self.held.pop(name, None)
