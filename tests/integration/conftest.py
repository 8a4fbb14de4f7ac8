import openai
import pytest

from tests.integration.serving import Server

BLOCK = 8  # of the server under test, unless a request asks for another


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for the whole folder: starting it takes longer than all of its tests."""
    server = Server(
        tmp_path_factory.mktemp("server") / "log.txt",
        *("--plugin", "vllm_dlm"),
        *("--max-model-len", "512"),
        *("--kv-cache-memory-bytes", str(16 << 20)),  # a dozen of the longest canvases do not fit at once
        *("--dlm-config", f'{{"decoding": {{"name": "low_confidence", "block_length": {BLOCK}}}}}'),
    )
    try:
        server.wait_until_healthy(seconds=300)
        yield server
        assert server.process.poll() is None, f"the server died\n{server.log_tail()}"
    finally:
        server.stop()


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def model(client) -> str:
    return client.models.list().data[0].id
