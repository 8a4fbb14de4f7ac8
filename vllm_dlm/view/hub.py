"""The hub of the live view in the front-end: admitted requests, and connections that follow them.

Requests are identified by vLLM's unique internal id. Clients may use the same X-Request-Id for several requests at the
same time, even with different numbers of choices.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError

from vllm_dlm.client_cache import ClientCache
from vllm_dlm.options.limits import Limits
from vllm_dlm.refusal import refuse
from vllm_dlm.view.frames import INTERVAL
from vllm_dlm.view.observed import Canvas, Cursor, ObservedRequest

#: maximum number of canvas positions per INTERVAL for all followers; with more positions, frames are less frequent
POSITIONS = 4096
#: seconds after which a follower with unread frames may be replaced by another
PATIENCE = 60.0


class TooManyOnlookers(GracefulHTTPError):
    """HTTP 503: another request or connection must end first."""

    def __init__(self, message: str):
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class Follower:
    """A connection that reads frames of canvases. It costs nothing until it reads."""

    def __init__(self) -> None:
        self.cursors: dict[Canvas, Cursor] = {}
        self.ready = asyncio.Event()
        self.dropped = False
        self.read_at = 0.0
        self.unread_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def positions(self) -> int:
        return sum(canvas.length for canvas in self.cursors)

    @property
    def stale(self) -> bool:
        return self.unread_since is not None and time.monotonic() - self.unread_since > PATIENCE

    def follow(self, canvas: Canvas) -> None:
        """Starts to follow a canvas. All earlier changes are sent in one frame."""
        self.cursors[canvas] = Cursor()
        if canvas.final is None:
            canvas.followers.append(self)
        if canvas.begin is not None or canvas.final is not None:
            self.notify()

    def notify(self, at_once: bool = False) -> None:
        """Makes new messages readable, immediately or HUB.interval() after the last read."""
        if self.unread_since is None:
            self.unread_since = time.monotonic()
        if self.ready.is_set() or (self._timer is not None and not at_once):
            return
        left = self.read_at + HUB.interval() - time.monotonic()
        if at_once or left <= 0:
            self._be_ready()
        else:
            self._timer = asyncio.get_running_loop().call_later(left, self._be_ready)

    def _be_ready(self) -> None:
        self._cancel_timer()
        self.ready.set()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def take(self) -> list[tuple[int, bytes]]:
        """New messages as (choice, JSON), in order"""
        self.ready.clear()
        self.unread_since = None
        HUB.followers.get(self)  # marks it as recently used
        found = []
        for canvas, cursor in list(self.cursors.items()):
            while (message := await canvas.next(cursor)) is not None:
                found.append((canvas.choice, message))
            if canvas.final is not None:
                found.append((canvas.choice, canvas.final))
                self.cursors.pop(canvas, None)
        self.read_at = time.monotonic()
        return found

    def drop(self) -> None:
        """Disconnects a follower that does not read, in favour of another."""
        self.dropped = True
        self.close()
        self.ready.set()

    def close(self) -> None:
        self._cancel_timer()
        for canvas in self.cursors:
            if self in canvas.followers:
                canvas.followers.remove(self)
        self.cursors.clear()
        HUB.followers.pop(self)


class Hub:
    def __init__(self) -> None:
        self.admitted: set[ObservedRequest] = set()
        self.requests: dict[str, ObservedRequest] = {}  # admitted requests with an internal id, by id
        self.followers: ClientCache[Follower, Follower] = ClientCache("followers", lambda follower: follower.drop())

    def __bool__(self) -> bool:
        return bool(self.admitted)

    def interval(self) -> float:
        """Minimum seconds between two frames of a follower"""
        return INTERVAL * max(1.0, sum(follower.positions for follower in self.followers.values()) / POSITIONS)

    # -- bounds ----------------------------------------------------------------------------

    def admit(
        self, request: ObservedRequest, limits: Limits, running: Callable[[str], bool] = lambda name: True
    ) -> None:
        """Admits a request or raises an error. `running`: whether vLLM still runs a request; a request of a client that
        does not read may have ended without being removed here."""
        if request.options.observed:
            if request.choices > limits.observed:
                refuse(
                    "n",
                    request.choices,
                    f"at most {limits.observed} choices can be observed (--dlm-config limits.observed)",
                )
            if self._observed() + request.choices > limits.observed:
                self.remove([each for name, each in self.requests.items() if not running(name)])
            if self._observed() + request.choices > limits.observed:
                raise TooManyOnlookers(
                    f"dlm_frames, dlm_watch: this server already observes {limits.observed} choices, its limit "
                    "(--dlm-config limits.observed); try again later or without the option"
                )
        if request.own is not None:
            self.admit_follower(request.own, limits)
        self.admitted.add(request)
        request.hub = self

    def _observed(self) -> int:
        return sum(each.choices for each in self.admitted if each.options.observed)

    def admit_follower(self, follower: Follower, limits: Limits) -> None:
        """Admits a follower. At the limit, it replaces a follower that has not read for PATIENCE seconds."""
        if follower in self.followers:
            return
        self.followers.bound = limits.followers
        if len(self.followers) >= limits.followers:
            stale = next((each for each in self.followers.values() if each.stale), None)
            if stale is None:
                raise TooManyOnlookers(
                    f"this server already has {limits.followers} connections that follow requests, its limit "
                    "(--dlm-config limits.followers); try again later"
                )
            self.followers.evict(stale)
        self.followers.put(follower, follower)

    # -- requests --------------------------------------------------------------------------

    def bind(self, request: ObservedRequest) -> None:
        if request.name in self.requests:  # possible with VLLM_DISABLE_REQUEST_ID_RANDOMIZATION
            raise ValueError(f"another request with the internal id {request.name!r} is running")
        self.requests[request.name] = request

    def remove(self, requests: Iterable[ObservedRequest]) -> None:
        """Removes requests that have ended for any reason."""
        for request in requests:
            self.admitted.discard(request)
            if self.requests.get(request.name) is request:
                del self.requests[request.name]
            request.end()
            if request.own is not None and not any(each.own is request.own for each in self.admitted):
                self.followers.pop(request.own)

    def watched(self) -> Iterator[Canvas]:
        for request in self.requests.values():
            if request.options.watch:
                yield from request.canvases

    def find(self, name: str, choice: int) -> Canvas | None:
        request = self.requests.get(name)
        if request is None or not request.options.watch or not 0 <= choice < request.choices:
            return None
        return request.canvases[choice]


HUB = Hub()
