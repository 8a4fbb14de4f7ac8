"""Clients of the server under test: some ask and compare, some behave badly. Each returns what it saw, and ends.

Only the standard library: a client that sends half a body or reads a byte at a time needs the socket.
"""

import http.client
import json
import random
import socket
import time
from dataclasses import dataclass, field

from tests.soak import bodies
from tests.soak.requests import Given

PATIENCE = 300  # seconds for an answer: far beyond what any takes
LARGEST_REFUSAL = 100_000  # bytes: nobody wants a wrong value back in megabytes


@dataclass
class Seen:
    client: str
    status: int | None = None  # None: the client left, or the server closed the connection on it
    problem: str | None = None
    size: int = 0


@dataclass
class Asked:
    """A request and, once it was served in peace, its answer."""

    path: str
    body: dict
    answer: list = field(default_factory=list)


class Client:
    def __init__(self, host: str, port: int, limit: int, vocab_size: int, mask_id: int):
        self.host, self.port = host, port
        self.limit, self.vocab_size, self.mask_id = limit, vocab_size, mask_id

    def post(self, path: str, body: bytes, headers: dict) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    # -- those who ask ---------------------------------------------------------------------

    def ask(self, asked: Asked) -> tuple[int, list]:
        status, data = self.post(asked.path, json.dumps(asked.body).encode(), bodies.JSON)
        return status, answer_of(data) if status == 200 else []

    def good(self, rng: random.Random, asked: Asked) -> Seen:
        status, answer = self.ask(asked)
        right = status == 200 and answer == asked.answer
        return Seen(
            "good",
            status,
            None if right else f"{asked.body} answered {status} {answer}, before {asked.answer}",
        )

    # -- those who err ---------------------------------------------------------------------

    def refused(self, rng: random.Random, _) -> Seen:
        return self._bad("refused", bodies.refused(rng, self.limit, self.vocab_size), range(400, 500))

    def odd(self, rng: random.Random, _) -> Seen:
        return self._bad("odd", bodies.odd(rng, self.limit, self.mask_id), range(200, 500))

    def large(self, rng: random.Random, _) -> Seen:
        return self._bad("large", bodies.large(rng), range(200, 500))  # what nobody reads may be as large as it likes

    def _bad(self, client: str, request: tuple, legal: range) -> Seen:
        path, body, _ = request
        try:
            status, data = self.post(*request)
        except (ConnectionError, http.client.HTTPException) as error:
            # A server may hang up on 10 MB; on the rest it must answer.
            return Seen(client, None, None if client == "large" else f"{path} {body[:300]!r}: {error!r}")
        seen = Seen(client, status, size=len(data))
        if status not in legal:
            seen.problem = f"{path} {body[:300]!r} was answered {status} {data[:300]!r}"
        elif status != 200 and len(data) > LARGEST_REFUSAL and b'"dlm_' in body[:200]:  # vLLM's own may repeat it
            seen.problem = f"{path} {body[:100]!r} was refused in {len(data)} bytes"
        elif status == 200 and b'"error"' in data[:20_000]:
            seen.problem = f"{path} {body[:300]!r}: an error inside of an answer, {data[:300]!r}"
        return seen

    # -- those who dawdle or leave ---------------------------------------------------------

    def slow_reader(self, rng: random.Random, asked: Asked) -> Seen:
        """A byte at a time; then it reads the rest at once, or leaves."""
        with self._sent(streamed(asked)) as connection:
            first = bytearray()
            for _ in range(rng.randint(20, 400)):
                byte = connection.recv(1)
                if not byte:
                    break
                first += byte
                time.sleep(0.001)
            if rng.random() < 0.5:
                return Seen("slow reader")
            while part := connection.recv(1 << 16):
                first += part
        return Seen(
            "slow reader",
            status_of(first),
            None if b"[DONE]" in first else f"a stream broke off: {first[-300:]!r}",
        )

    def slow_sender(self, rng: random.Random, asked: Asked) -> Seen:
        data = raw(asked)
        with socket.create_connection((self.host, self.port), PATIENCE) as connection:
            for start in range(0, len(data), 1 + len(data) // 100):
                connection.sendall(data[start : start + 1 + len(data) // 100])
                time.sleep(0.002)
            answer = read_all(connection)
        status = status_of(answer)
        return Seen("slow sender", status, None if status == 200 else f"answered {answer[:300]!r}")

    def half_a_body(self, rng: random.Random, asked: Asked) -> Seen:
        data = raw(asked)
        with socket.create_connection((self.host, self.port), PATIENCE) as connection:
            connection.sendall(data[: rng.randrange(1, len(data))])
        return Seen("half a body")

    def leaves(self, rng: random.Random, asked: Asked) -> Seen:
        """Before the answer, or within it."""
        with self._sent(streamed(asked) if rng.random() < 0.7 else asked) as connection:
            if rng.random() < 0.6:
                connection.recv(rng.randint(1, 600))
            else:
                time.sleep(rng.random() * 0.05)
        return Seen("leaves")

    def no_http(self, rng: random.Random, _) -> Seen:
        with socket.create_connection((self.host, self.port), PATIENCE) as connection:
            connection.sendall(
                rng.choice((b"\x16\x03\x01\x02\x00", b"GET", b"\r\n\r\n", b"POST / HTTP/9\r\n\r\n", b"\0" * 999))
            )
            connection.shutdown(socket.SHUT_WR)
            status = status_of(read_all(connection))
        return Seen("no HTTP", status, f"answered {status}" if status and status >= 500 else None)

    def _sent(self, asked: Asked) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), PATIENCE)
        connection.sendall(raw(asked))
        return connection


def streamed(asked: Asked) -> Asked:
    return Asked(asked.path, asked.body | {"stream": True})


def raw(asked: Asked) -> bytes:
    body = json.dumps(asked.body).encode()
    head = f"POST {asked.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    data = bytearray()
    try:
        while part := connection.recv(1 << 16):
            data += part
    except ConnectionError:
        pass
    return bytes(data)


def status_of(answer: bytes) -> int | None:
    words = bytes(answer[:20]).split()
    return int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else None


def answer_of(data: bytes) -> list:
    """What must be the same every time: text, tokens and why it ended, of each sample."""
    choices = json.loads(data)["choices"]
    return [
        [
            choice.get("text", (choice.get("message") or {}).get("content")),
            choice.get("token_ids"),
            choice["finish_reason"],
        ]
        for choice in sorted(choices, key=lambda choice: choice["index"])
    ]


def over_http(given: Given, model: str) -> Asked:
    fields = {key: value for key, value in given.fields.items() if key not in ("extra_args", "detokenize")}
    body = {"model": model, "prompt": list(given.prompt), "return_token_ids": True, **fields}
    return Asked("/v1/completions", body | {"vllm_xargs": given.fields["extra_args"]})
