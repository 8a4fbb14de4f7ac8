"""A server on loopback that speaks as much of vLLM's API as the page uses, and sends known frames."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from tests.view import synthetic
from vllm_dlm.view.page import page

OFFERS = {
    "decoding": ["low_confidence", "low_confidence/fast", "wino"],
    "reuse": ["none", "fast_dllm", "dllm_cache"],
    "selection": ["none", "unique"],
    "extent": ["full", "window"],
    "server": {
        "decoding": {"name": "low_confidence", "block_length": 12, "threshold": None},
        "reuse": {"name": "none"},
        "selection": {"name": "none"},
        "extent": {"name": "full"},
    },
}


class Mock(ThreadingHTTPServer):
    daemon_threads = True
    key: str | None = None  # that it asks for
    late = ""  # a path whose refusals wait for `go`
    holds_at: int | None = None  # so many frames of a stream, until `go` is set
    refuses = ""  # what it says to a chat
    ends_early = False
    merge = 1  # frames to one

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.go = Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Mock

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/dlm":
            return self.answer(page(), "text/html; charset=utf-8")
        if self.locked():
            return None
        known = {
            "/v1/models": {"data": [{"id": "mock"}]},
            "/dlm/options": OFFERS,
            "/dlm/requests": [
                {
                    "request": "cmpl-a/b",
                    "choice": 1,
                    "prompt_tokens": 24,
                    "canvas": 24,
                    "reuse": "fast_dllm",
                    "selection": "none",
                    "seconds": 0.1,
                }
            ],
        }
        if self.path in known:
            return self.answer(json.dumps(known[self.path]))
        if self.path == "/dlm/watch/cmpl-a%2Fb?choice=1":
            return self.stream(synthetic.frames(24, {"dlm_reuse": "fast_dllm"}))
        return self.answer("{}", status=404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.locked():
            return None
        self.server.asked.append(body)
        if self.server.refuses:
            return self.answer(json.dumps({"error": {"message": self.server.refuses, "code": 400}}), status=400)
        frames = synthetic.frames(body.get("max_tokens", 24), body["vllm_xargs"])
        if self.server.ends_early:
            frames = frames[:-3]
        frames = synthetic.merged(frames, self.server.merge)
        return self.stream([{"choices": [{"index": 0, "delta": {}}], "dlm": frame} for frame in frames])

    def locked(self) -> bool:
        key = self.server.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        if self.path == self.server.late:
            self.server.go.wait(60)
        self.answer(json.dumps({"error": "Unauthorized"}), status=401)
        return True

    def answer(self, text: str, kind: str = "application/json", status: int = 200) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, chunks: list[dict]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for number, chunk in enumerate(chunks):
                if number == self.server.holds_at:
                    self.server.go.wait(60)
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            pass  # somebody pressed Stop


@contextmanager
def mock() -> Iterator[Mock]:
    with Mock() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.go.set()
        server.shutdown()
