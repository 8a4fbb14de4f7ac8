"""A row of the table: hostile requests of one kind, and the status codes that a sound server answers them with."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.soak.bodies import JSON
from vllm_dlm.options import Options, server_options

#: statuses of a refusal
REFUSALS = frozenset({400, 404, 413, 422, 429, 431})
LEGAL, REFUSED = frozenset({200}), REFUSALS
#: a limit of all clients together: another client has to end first
CROWDED = frozenset({503})
#: either is right: the row is about what an answer costs
ANSWERED = LEGAL | REFUSALS
PROMPT = 8  # tokens of most prompts
#: fills a canvas of any length in one step
AT_ONCE = {"dlm_threshold": 0}
COMPLETIONS, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/dlm/score"


@dataclass(frozen=True)
class Target:
    """The server under test, and how large the requests are."""

    max_model_len: int
    vocab_size: int
    mask_id: int
    server: Options = field(default_factory=lambda: server_options({}, "low_confidence"))
    model: str = "demo"
    view: bool = True  # started with --dlm-view
    large: int = 10 << 20  # bytes of an absurd body
    flood: int = 50  # concurrent requests of a flood
    seed: int = 0  # other prompts, templates and texts: no cache of the server has seen them
    headers: dict = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Positions of the longest canvas that goes with a prompt of PROMPT tokens"""
        longest = self.max_model_len - PROMPT
        return longest if self.server.canvas.max is None else min(longest, self.server.canvas.max)

    def text(self, size: int, number: int) -> str:
        """Words of the demo's vocabulary, different for each number"""
        words = "the old table holds the green river and "
        return (f"{self.seed} {number} " + words * (size // len(words) + 1))[:size]

    def prompt(self, number: int) -> list[int]:
        """Different token ids for each number, without the mask"""
        digits = (self.seed * 1_000_003 + number) % (self.vocab_size**3)
        ids = [digits // self.vocab_size**power % self.vocab_size for power in range(3)]
        ids = [token + (token == self.mask_id) for token in ids]
        return [5] * (PROMPT - len(ids)) + ids

    def body(self, number: int, extra: dict | None = None, **fields) -> dict:
        """A completion of 4 tokens; `extra`: its vllm_xargs"""
        body = {"model": self.model, "prompt": self.prompt(number), "max_tokens": 4, "temperature": 0}
        return body | ({"vllm_xargs": extra} if extra is not None else {}) | fields


@dataclass(frozen=True)
class Message:
    """One HTTP request"""

    path: str
    body: bytes
    headers: dict = field(default_factory=lambda: JSON)
    method: str = "POST"

    def raw(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: server", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join(lines).encode(errors="replace") + b"\r\n\r\n" + self.body


Make = Callable[[Target, int], Message]


@dataclass(frozen=True)
class Row:
    kind: str
    name: str
    make: Make  # the message of that number; no two are the same
    expected: frozenset[int] = ANSWERED
    clients: int = 2  # concurrent requests
    act: str = "ask"  # see acts.py
    #: a row without a field of this package: it shows what vLLM itself spends on a body of that size
    control: bool = False
    #: the shape of a large body; vLLM itself may exceed a bar on the control row of the same shape
    like: str = ""
    #: an answer may take longer than a client waits; the status is checked if it comes
    long: bool = False


def posted(path: str, body: Any, headers: dict | None = None) -> Message:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Message(path, data, JSON | (headers or {}))


def completion(**fields) -> Make:
    """The same completion with another prompt each time"""
    return lambda target, number: posted(COMPLETIONS, target.body(number, **fields))


def with_options(extra: dict, **fields) -> Make:
    return completion(extra=extra, **fields)


def table(target: Target) -> list[Row]:
    """All rows. Expensive kinds come last: a server that ends there was tested with the others."""
    from tests.soak.hostile import acts, fields, given, options, scores

    rows: list[Row] = []
    for make in (options.rows, fields.rows, given.rows, scores.rows, acts.rows):
        rows += _of(make, target)
    names = [(row.kind, row.name) for row in rows]
    assert len(set(names)) == len(names), "two rows have one name"
    return rows


def _of(make: Callable[[Target], Iterator[Row]], target: Target) -> list[Row]:
    return list(make(target))


def sample(rows: list[Row]) -> list[Row]:
    """One row of each kind and expectation, the last one: for a run of a minute"""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[row.kind, row.expected, row.act] = row
    return list(found.values())
