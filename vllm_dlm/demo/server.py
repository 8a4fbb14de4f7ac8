"""Starts one `vllm serve`, waits until it answers, and stops that one again."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from contextlib import suppress
from pathlib import Path

from vllm_dlm.demo.client import urlopen

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


class ServerError(Exception):
    """The server did not come up or went away; the message ends with the last of its log."""


class Server:
    def __init__(self, port: int | None = None):
        self.port = bindable(port or 0)
        self.command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(CHECKPOINT), "--plugin", "vllm_dlm",
            "--served-model-name", MODEL, "--host", HOST, "--port", str(self.port),
            # room for a handful of canvases; unasked, vLLM would take most of a GPU's memory
            "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--max-num-batched-tokens", "4096",
            "--kv-cache-memory-bytes", str(128 << 20),
        ]  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> "Server":
        self.log = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **os.environ},
                # Ctrl-C is for this program, which then ends the server in its own way.
                start_new_session=True,
            )
        except FileNotFoundError:
            raise ServerError(f"{self.command[0]} does not exist: vLLM is not installed beside this Python") from None
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
            self.log.close()

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
            with urlopen(f"{self.url}/health", timeout=5):
                # Another server on this port would answer, too.
                return self.process.poll() is None
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def log_tail(self, lines: int = 30) -> str:
        self.log.seek(0)
        return "\n".join(self.log.read().decode(errors="replace").splitlines()[-lines:])


def bindable(port: int) -> int:
    """`port`, or any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(f"port {port} of {HOST} cannot be used: {error.strerror}") from None
        return probe.getsockname()[1]
