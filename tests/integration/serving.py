"""The demo's `vllm serve` with what tests ask of it, and questions the bundled checkpoint can answer."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from vllm_dlm import client
from vllm_dlm.demo import server as demo

CHECKPOINT = demo.CHECKPOINT
KEY = "key-of-the-live-view"
BLOCK = 8  # block length of the server under test, unless a request asks for another


def vllm_environment() -> dict[str, str]:
    """As a user has it: what the tests set for engines inside their own process is taken back."""
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL")
    return demo.ENVIRONMENT | {name: value for name, value in os.environ.items() if name not in ours}


#: An engine computes in its own process, as on a GPU, and not in one more: two starts of vLLM instead of three.
WITHOUT_A_WORKER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@contextmanager
def serving(log: Path, *arguments: str, checkpoint: Path = CHECKPOINT, **environment: str) -> Iterator["Server"]:
    """A server that answers; unless it was told to end, it must still be there afterwards."""
    environment = vllm_environment() | WITHOUT_A_WORKER | environment
    if torch.cuda.is_available():  # beside others: what vLLM asks to be free when it starts
        arguments = (*arguments, "--gpu-memory-utilization", "0.05")
    with Server(*arguments, checkpoint=checkpoint, log=log, environment=environment) as server:
        server.wait(600)
        yield server
        if not server.may_end:
            server.check()


class Server(demo.Server):
    may_end = False  # before its `with` does

    def __init__(self, *arguments: str, **where):
        super().__init__(*arguments, **where)
        self.client = client.connect(self.url)

    def __exit__(self, *_) -> None:
        self.client.close()
        super().__exit__()

    @cached_property
    def model(self) -> str:
        return self.client.models.list().data[0].id

    def end(self) -> None:
        self.may_end = True
        self.process.terminate()

    def metrics(self, engine: str | None = None) -> dict[str, float]:
        """name -> value, summed over labels; of one replica alone with `engine`."""
        text = httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if engine in (None, sample.labels.get("engine")):
                    values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    def counted(self, function: Callable) -> tuple[Any, dict[str, float]]:
        """Its result, and how far each `vllm:diffusion_*` counter went meanwhile."""
        before = self.metrics()
        result = function()
        after = self.metrics()
        return result, {
            re.sub("^vllm:diffusion_(num_)?|_total$", "", name): after[name] - before[name]
            for name in after
            if name.startswith("vllm:diffusion_") and name.endswith("_total")
        }

    def token_id(self, text: str) -> int:
        body = {"prompt": text, "add_special_tokens": False}
        (token,) = httpx.post(f"{self.url}/tokenize", json=body, timeout=60, trust_env=False).json()["tokens"]
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
