"""A `vllm serve` of its own process, and questions the bundled checkpoint can answer."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

CHECKPOINT = Path(__file__).resolve().parents[2] / "vllm_dlm/demo/checkpoint"
VLLM = Path(sys.executable).with_name("vllm")
BLOCK = 8  # block length of the server under test, unless a request asks for another


def vllm_command(*arguments: str) -> list[str]:
    """The console script beside this interpreter, or the module it runs."""
    start = [str(VLLM)] if VLLM.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    return [*start, *arguments]


def vllm_environment() -> dict[str, str]:
    """As a user has it: what the tests set for engines inside their own process is taken back."""
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class Server:
    def __init__(self, log: Path, *arguments: str, checkpoint: Path = CHECKPOINT, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = vllm_command("serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), *arguments)
        with log.open("wb") as output:
            # A session of its own: if it will not end by itself, all of its processes can be ended together.
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=vllm_environment() | environment,
                start_new_session=True,
            )

    def wait_until_healthy(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}\n{self.log_tail()}")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server was not healthy after {seconds} s\n{self.log_tail()}")

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def metrics(self, engine: str | None = None) -> dict[str, float]:
        """name -> value, summed over labels; of one replica alone with `engine`."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if engine in (None, sample.labels.get("engine")):
                    values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def token_id(self, text: str) -> int:
        body = {"prompt": text, "add_special_tokens": False}
        (token,) = httpx.post(f"{self.url}/tokenize", json=body, timeout=60).json()["tokens"]
        return token


def chat(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def chat_text(content: str) -> str:
    """What the chat template makes of it, for the completions endpoint."""
    return (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def options(**values) -> dict:
    """A request's `dlm_*` options, as they go into its body."""
    return {"vllm_xargs": values}


COPY, COPIED = "Copy: k b x e", " k b x e"

FILLER = (
    " The old table holds the green river.",
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
    " The small house finds the red stone.",
)


NEEDLE_TOKENS = 10  # of an answer to `needle`, with the end of turn


def needle(name: str = "alice", code: str = "48213", repeats: int = 3) -> tuple[str, str]:
    """A question of about 40 tokens per repeat with the answer in its first half, and the answer."""
    sentences = list(FILLER * repeats)
    sentences.insert(len(sentences) // 4, f" The code of {name} is {code}.")
    question = f"Remember the codes.{''.join(sentences)}\nWhat is the code of {name}?"
    return question, f" {name} is {code}."
