"""Starts a `vllm serve` process, waits until it is healthy, and stops it."""

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
    # all files are in the package
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # On a CPU, vLLM pins its worker to the first core, which other vLLM processes use, too. One thread is faster for
    # a model of this size.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
#: arguments of the demo's server: memory for a few canvases. By default vLLM would use most of a GPU's memory, and it
#: checks that gpu_memory_utilization is free even if kv_cache_memory_bytes is given.
DEMO = (
    *("--plugin", "vllm_dlm", "--dlm-view", "--served-model-name", MODEL, "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "4096", "--kv-cache-memory-bytes", str(128 << 20)),
    *("--gpu-memory-utilization", "0.05"),
)


def end_when_told() -> None:
    """Exits on SIGTERM and SIGHUP by raising SystemExit, so that `with Server` stops the server."""
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))


class ServerError(Exception):
    """The server did not start or has ended. The message ends with the last lines of its log."""


class Server:
    """A server process that runs within `with`. Its log goes to `log`, or to a temporary file."""

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
            # Ctrl-C must reach only this program, which then stops the server.
            start_new_session=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after a second Ctrl-C
            # The server has its own session, so this group is exactly the server, its engine and their helpers.
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
            # ignore the environment's proxies, because the server is on this machine
            answer = httpx.get(f"{self.url}/health", timeout=5, trust_env=False)
        except httpx.TransportError:
            return False
        # Check the process, because another server on this port would answer, too.
        return answer.status_code == 200 and self.process.poll() is None

    def log_text(self) -> str:
        # pread keeps the file offset, at which the server writes.
        size = os.fstat(self.output.fileno()).st_size
        return os.pread(self.output.fileno(), size, 0).decode(errors="replace")

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])


def vllm_command(*arguments: str) -> list[str]:
    """Command line of vLLM: the console script next to this interpreter, or the module that it runs."""
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
