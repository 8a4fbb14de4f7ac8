"""How rows are sent, and rows that need more than one exchange: streams that end early, followers, shared names."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from tests.soak.clients import status_of
from tests.soak.hostile.rows import (
    ANSWERED,
    AT_ONCE,
    COMPLETIONS,
    CROWDED,
    LEGAL,
    REFUSED,
    Message,
    Row,
    Target,
    completion,
    posted,
)

MOST_KEPT = 1 << 16  # bytes of an answer that are kept: its start and its end


@dataclass(frozen=True)
class Outcome:
    status: int | None  # None: the client left before there was one
    problem: str | None = None


@dataclass(frozen=True)
class Wire:
    host: str
    port: int

    def connect(self, deadline: float) -> socket.socket:
        return socket.create_connection((self.host, self.port), max(deadline - time.monotonic(), 0.1))

    def ask(self, raw: bytes, deadline: float) -> tuple[Outcome, bytes]:
        """Sends all of it and reads to the end, or until the deadline."""
        kept = bytearray()
        try:
            with self.connect(deadline) as connection:
                # A server may answer and hang up before it has read 10 MB.
                with suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(raw)
                while True:
                    connection.settimeout(max(deadline - time.monotonic(), 0.001))
                    part = connection.recv(1 << 18)
                    if not part:
                        break
                    kept += part
                    if len(kept) > 2 * MOST_KEPT:
                        del kept[MOST_KEPT:-MOST_KEPT]
        except TimeoutError:
            return Outcome(None), bytes(kept)
        except OSError as error:
            if not kept:
                return Outcome(None, f"no answer: {error!r}"), b""
        return outcome_of(bytes(kept)), bytes(kept)


def outcome_of(answer: bytes) -> Outcome:
    """Errors within a stream count as the status that they name."""
    status = status_of(answer)
    if status == 200 and b'data: {"error"' in answer:
        line = answer[answer.index(b'data: {"error"') + 6 :].split(b"\n")[0]
        try:
            code = json.loads(line)["error"].get("code")
        except (ValueError, AttributeError):
            code = None
        status = code if isinstance(code, int) else 500
    if status == 200 and b'"finish_reason":"error"' in answer.replace(b" ", b""):
        return Outcome(500, "finish_reason: error")
    text = " ".join(answer[-300:].decode(errors="replace").split())
    return Outcome(status, text if status is None or status >= 500 else None)


Act = Callable[[Wire, Target, Row, range, float], list[Outcome]]


def together(function: Callable[[int], Outcome], numbers: range) -> list[Outcome]:
    with ThreadPoolExecutor(max(len(numbers), 1)) as pool:
        return list(pool.map(function, numbers))


def ask(wire: Wire, target: Target, row: Row, numbers: range, deadline: float) -> list[Outcome]:
    raw = {number: message_of(row, target, number).raw() for number in numbers}  # made before the first is sent
    return together(lambda number: wire.ask(raw[number], deadline)[0], numbers)


def message_of(row: Row, target: Target, number: int) -> Message:
    message = row.make(target, number)
    return replace(message, headers=message.headers | target.headers)


def leave(wire: Wire, target: Target, row: Row, numbers: range, deadline: float) -> list[Outcome]:
    """Reads the first bytes of each answer, and hangs up."""

    def one(number: int) -> Outcome:
        try:
            with wire.connect(deadline) as connection:
                connection.sendall(message_of(row, target, number).raw())
                return Outcome(status_of(connection.recv(1 << 12)))
        except OSError:
            return Outcome(None)

    return together(one, numbers)


def hang_up(wire: Wire, target: Target, row: Row, numbers: range, deadline: float) -> list[Outcome]:
    """Sends the request and hangs up at once."""

    def one(number: int) -> Outcome:
        try:
            with wire.connect(deadline) as connection:
                connection.sendall(message_of(row, target, number).raw())
        except OSError:
            pass
        return Outcome(None)

    return together(one, numbers)


def silent(wire: Wire, target: Target, row: Row, numbers: range, deadline: float) -> list[Outcome]:
    """Sends the requests and reads nothing for SILENT seconds; then hangs up."""
    sockets: list[socket.socket] = []
    try:
        for number in numbers:
            connection = wire.connect(deadline)
            sockets.append(connection)
            connection.sendall(message_of(row, target, number).raw())
        time.sleep(max(min(SILENT, deadline - time.monotonic()), 0))
    except OSError:
        pass
    finally:
        for connection in sockets:
            connection.close()
    return [Outcome(None) for _ in numbers]


SILENT = 4.0


def watch(wire: Wire, target: Target, row: Row, numbers: range, deadline: float) -> list[Outcome]:
    """The row's request runs, and the clients follow it: every other one reads, the others do not."""
    name = f"watched-{target.seed}-{numbers.start}"
    watched = message_of(row, target, numbers.start)
    watched = replace(watched, headers=watched.headers | {"X-Request-Id": name})
    readers: list[socket.socket] = []
    try:
        with wire.connect(deadline) as connection:
            connection.sendall(watched.raw())
            connection.recv(1)
            found = listed(wire, target, name, min(deadline, time.monotonic() + 5))
            follow = Message(f"/dlm/watch/{found or name}", b"", target.headers, "GET")
            for _ in numbers:
                reader = wire.connect(deadline)
                readers.append(reader)
                reader.sendall(follow.raw())
            end = min(time.monotonic() + SILENT, deadline)
            read = together(lambda index: read_until(readers[index], end), range(0, len(readers), 2))
    except OSError as error:
        return [Outcome(None, f"no answer: {error!r}")]
    finally:
        for reader in readers:
            reader.close()
    return read


def read_until(connection: socket.socket, end: float) -> Outcome:
    start = bytearray()
    try:
        while (left := end - time.monotonic()) > 0:
            connection.settimeout(left)
            part = connection.recv(1 << 16)
            if not part:
                break
            if len(start) < 100:
                start += part[:100]
    except OSError:
        pass
    return Outcome(status_of(bytes(start)))


def listed(wire: Wire, target: Target, name: str, deadline: float) -> str | None:
    """The name under which a request can be followed"""
    raw = Message("/dlm/requests", b"", target.headers, "GET").raw()
    while time.monotonic() < deadline:
        _, answer = wire.ask(raw, deadline)
        _, _, body = answer.partition(b"\r\n\r\n")
        try:
            found = [each["request"] for each in json.loads(body) if name in each["request"]]
        except (ValueError, TypeError):
            found = []
        if found:
            return found[0]
        time.sleep(0.05)
    return None


ACTS: dict[str, Act] = {"ask": ask, "leave": leave, "hang_up": hang_up, "silent": silent, "watch": watch}


# -- rows ----------------------------------------------------------------------------------


def rows(target: Target) -> Iterator[Row]:
    room, flood = target.room, target.flood
    long = {"max_tokens": room, "stream": True, "ignore_eos": True}
    slow = {"dlm_block_length": 8}  # a chunk every 8 steps, for as long as the client stays
    frames = {"dlm_frames": 1, **slow}

    def row(name: str, extra: dict, act="ask", expected=LEGAL, clients=flood, like="", **fields) -> Row:
        return Row("stream", name, completion(extra=extra, **fields), expected, clients, act, like=like, long=True)

    for clients in (target.server.limits.observed + 1, 300):
        yield Row(
            "control", crowd(clients), completion(**long), LEGAL, clients, "leave", True, crowd(clients), long=True
        )

    yield row("cancelled after the first bytes", slow, "leave", **long)
    yield row("cancelled at once", slow, "hang_up", **long)
    yield row("never read", slow, "silent", clients=16, **long)
    yield row("frames, to the end", {"dlm_frames": 1}, max_tokens=32, stream=True)
    yield row("frames of a canvas filled at once", {"dlm_frames": 1, **AT_ONCE}, max_tokens=room, stream=True)
    yield row("frames, cancelled", frames, "leave", **long)
    yield row("frames, never read", frames, "silent", clients=16, **long)
    yield row(
        "frames and trajectories of 8 samples",
        {"dlm_frames": 1, "dlm_trajectory": 1},
        clients=4,
        n=8,
        temperature=1.0,
        seed=3,
        max_tokens=32,
        stream=True,
    )
    yield row("frames without a stream", {"dlm_frames": 1}, expected=REFUSED)
    watched = LEGAL if target.view else REFUSED
    yield row("watched and never followed", {"dlm_watch": 1}, expected=watched, max_tokens=32)
    most = target.server.limits.observed
    crowded = ANSWERED | CROWDED
    yield row("observed, one above", frames, "leave", crowded, most + 1, like=crowd(most + 1), **long)
    if target.view:
        followers = target.server.limits.followers
        watch = {"dlm_watch": 1, **slow}
        yield row("followers", watch, "watch", ANSWERED, followers, **long)
        yield row("followers, one above", watch, "watch", crowded, followers + 1, **long)
        yield row("followers, 300", watch, "watch", crowded, 300, like=crowd(300), **long)
        for path in ("/dlm/options", "/dlm/requests", "/dlm", "/dlm/watch/" + "x" * 30_000):
            found = REFUSED if len(path) > 100 else LEGAL
            name = f"GET {path[:20]}"

            def get(target: Target, number: int, path=path) -> Message:
                return Message(path, b"", {}, "GET")

            yield Row("view", name, get, found, clients=flood)
    yield from shared_names(target)


def crowd(clients: int) -> str:
    """Name of the control row for more concurrent clients than a flood has"""
    return f"{clients} plain streams"


def shared_names(target: Target) -> Iterator[Row]:
    """Requests with one X-Request-Id and different numbers of samples, all at once"""

    def named(extra: dict, **fields):
        def make(target: Target, number: int) -> Message:
            samples = {"n": 1 + number % 3, "temperature": 1.0, "seed": number}
            body = target.body(number, extra=extra, max_tokens=8, **samples, **fields)
            return posted(COMPLETIONS, body, {"X-Request-Id": f"shared-{target.seed}-{number // 10}"})

        return make

    for name, extra, fields in (
        ("plain", {}, {}),
        ("streamed", {}, {"stream": True}),
        ("frames", {"dlm_frames": 1}, {"stream": True}),
        ("watched", {"dlm_watch": 1}, {"stream": True}),
        ("trajectories", {"dlm_trajectory": 1}, {}),
    ):
        if name != "watched" or target.view:
            yield Row("one X-Request-Id", name, named(extra, **fields), LEGAL, target.flood, long=True)
