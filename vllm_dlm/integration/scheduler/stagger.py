"""Which refreshes run in a step of the engine."""

from collections import Counter
from collections.abc import Iterable

from vllm_dlm.canvas.canvas import Canvas

#: share of its own steps that a request waits for refreshes of others, at most
HELD_BACK = 0.1


class RefreshStagger:
    """Spreads refreshes, which are expensive and come at intervals, evenly over the steps of the engine.

    A request whose refresh is due waits while others refresh, for at most HELD_BACK of its own steps, unless its policy
    says otherwise. Its result does not depend on the engine's step in which its own step runs."""

    def __init__(self) -> None:
        self.refreshed: Counter[str] = Counter()  # refreshes among the steps of each running request
        self.held: Counter[str] = Counter()  # how often each was held back
        self.left = 0  # refreshes that may still run in this step

    def begin(self, running: Iterable[tuple[str, Canvas]]) -> None:
        """A step of the engine begins: as many refreshes may run as keep up with those that fall due."""
        requests = list(running)
        steps = sum(canvas.step for _, canvas in requests)
        made = sum(self.refreshed[name] for name, _ in requests)
        self.left = -(-len(requests) * made // steps) if steps else len(requests)

    def holds_back(self, name: str, canvas: Canvas) -> bool:
        """Whether the request waits in this step, which is counted."""
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
