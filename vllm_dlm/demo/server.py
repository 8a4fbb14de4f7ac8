"""Starts one `vllm serve`, waits until it answers, and stops that one again."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx

CHECKPOINT = Path(__file__).with_name("checkpoint")
HOST = "127.0.0.1"
MODEL = "demo"
MAX_MODEL_LEN = 2048
ENVIRONMENT = {
    # everything it needs is in the package
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # On a CPU vLLM ties its worker to the first core, where every other vLLM has its own; and a model of this
    # size only loses by being shared out.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
#: of the demo: room for a handful of canvases; unasked, vLLM would take most of a GPU's memory, and asks for it to be
#: free even where it is told how much it may take
DEMO = (
    *("--plugin", "vllm_dlm", "--dlm-view", "--served-model-name", MODEL, "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "4096", "--kv-cache-memory-bytes", str(128 << 20)),
    *("--gpu-memory-utilization", "0.05"),
)


def end_when_told() -> None:
    """By leaving `with`, so that a server is stopped, too."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))


class ServerError(Exception):
    """The server did not come up or went away; the message ends with the last of its log."""


class Server:
    """Runs inside of `with`. Its log goes to a file of that name, or to one that nobody sees."""

    def __init__(
        self,
        *arguments: str,
        checkpoint: Path | str = CHECKPOINT,
        port: int | None = None,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self.port, self.log = bindable(port or 0), log
        self.environment = {**ENVIRONMENT, **os.environ} if environment is None else environment
        self.command = vllm_command("serve", str(checkpoint), "--host", HOST, "--port", str(self.port), *arguments)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        self.output = tempfile.TemporaryFile() if self.log is None else self.log.open("w+b")
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=self.environment,
            # Ctrl-C is for this program, which then ends the server in its own way.
            start_new_session=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:  # a second Ctrl-C comes through here, too
            # Its own session, so this group is the server, its engine and their helpers, and nothing else.
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.output.close()

    def wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not self.healthy():
            self.check()
            if time.monotonic() > end:
                raise ServerError(f"vllm serve was not ready after {timeout:.0f} s\n{self.log_tail()}")
            time.sleep(0.2)

    def check(self) -> None:
        if self.process.poll() is not None:
            raise ServerError(f"vllm serve ended with status {self.process.returncode}\n{self.log_tail()}")

    def healthy(self) -> bool:
        try:
            # without the proxies of the environment: the server is on this machine
            answer = httpx.get(f"{self.url}/health", timeout=5, trust_env=False)
        except httpx.TransportError:
            return False
        # Another server on this port would answer, too.
        return answer.status_code == 200 and self.process.poll() is None

    def log_text(self) -> str:
        # The server writes where this file stands, so that place is left alone.
        size = os.fstat(self.output.fileno()).st_size
        return os.pread(self.output.fileno(), size, 0).decode(errors="replace")

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])


def vllm_command(*arguments: str) -> list[str]:
    """The console script beside this interpreter, or the module it runs."""
    script = Path(sys.executable).with_name("vllm")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return [*start, *arguments]


def bindable(port: int) -> int:
    """`port`, or any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(f"port {port} of {HOST} cannot be used: {error.strerror}") from None
        return probe.getsockname()[1]
