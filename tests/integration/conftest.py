import json

import openai
import pytest

from tests.integration.serving import BLOCK, KEY, chat, serving
from tests.view.browsing import browser, exported, visit

__all__ = ["browser", "exported", "visit"]  # fixtures

DLM_CONFIG = {"decoding": {"name": "low_confidence", "block_length": BLOCK}, "canvas": {"max": 400}}
SELECTION = {"name": "unique", "min_context": 0, "page_size": 16, "budget_tokens": 256, "dense_layers": []}


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for the whole folder: starting it takes longer than all of its tests."""
    arguments = (
        *("--plugin", "vllm_dlm"),
        *("--max-model-len", "512"),
        *("--kv-cache-memory-bytes", str(16 << 20)),  # ten canvases of the longest kind
        *("--dlm-config", json.dumps(DLM_CONFIG)),
    )
    with serving(tmp_path_factory.mktemp("server") / "log.txt", *arguments) as server:
        yield server


@pytest.fixture(scope="session")
def viewed(tmp_path_factory):
    """A server with the page and a key, whose engine is a process of its own. Its own selection reads a part of long
    prompts, and prompts may be long enough for `wavefilter`, too."""
    arguments = (
        *("--plugin", "vllm_dlm", "--dlm-view", "--api-key", KEY, "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", str(32 << 20)),
        *("--dlm-config", json.dumps(DLM_CONFIG | {"canvas": {}, "selection": SELECTION})),
    )
    log = tmp_path_factory.mktemp("viewed") / "log.txt"
    with serving(log, *arguments, VLLM_ENABLE_V1_MULTIPROCESSING="1") as server:
        server.client = server.client.with_options(api_key=KEY)
        yield server


@pytest.fixture(scope="session")
def client(server):
    return server.client


@pytest.fixture(scope="session")
def model(server) -> str:
    return server.model


@pytest.fixture
def complete(client, model):
    """complete(prompt, **fields): fields that `openai` does not know go into the body."""

    def create(prompt, max_tokens: int = 16, extra: dict | None = None, **fields):
        return client.completions.create(model=model, prompt=prompt, max_tokens=max_tokens, extra_body=extra, **fields)

    return create


@pytest.fixture
def ask(client, model):
    def create(question: str, max_tokens: int | openai.Omit = 16, extra: dict | None = None, **fields):
        return client.chat.completions.create(
            model=model, messages=chat(question), max_tokens=max_tokens, extra_body=extra, **fields
        )

    return create


@pytest.fixture
def counted(server):
    """counted(function) -> its result, and how far the `vllm:diffusion_*` counters went meanwhile."""
    return server.counted
