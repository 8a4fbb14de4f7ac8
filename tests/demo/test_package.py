"""What `make demo` builds on: the package is whole, the demo answers and cleans up."""

import configparser
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_dlm import client
from vllm_dlm.demo.questions import questions
from vllm_dlm.demo.server import Server, ServerError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"vllm_dlm": "vllm_dlm", "plugins": "vllm_dlm/plugins", "kernels": "vllm_dlm/kernels"}


def test_a_wheel_holds_every_module_and_the_checkpoint(tmp_path):
    source = tmp_path / "source"  # setuptools builds inside the source tree
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        inside = set(wheel.namelist())
    wanted = {
        f"{package}/{path.relative_to(source / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (source / folder).rglob("*")
        if path.suffix == ".py" or path.parent.name == "checkpoint"
    }
    missing = sorted(wanted - inside)
    assert not missing, f"not listed in pyproject.toml's packages: {missing}"


def test_vllm_finds_the_plugin():
    (point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="vllm_dlm")
    assert point.value == "vllm_dlm:register"


def test_vllm_starts_when_it_is_told_to_load_this_plugin_alone(tmp_path):
    """VLLM_PLUGINS lets in entry points by name, those that make the CPU wheel start as well."""
    info = tmp_path / "vllm_dlm-0.1.0.dist-info"  # as pip would make it now, whenever this one was installed
    info.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".format(**project))
    points = configparser.ConfigParser(delimiters="=")
    points.read_dict(project["entry-points"])
    with (info / "entry_points.txt").open("w") as file:
        points.write(file)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_TARGET_DEVICE"}
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": path, "VLLM_PLUGINS": "vllm_dlm"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.32")


# -- the demo ------------------------------------------------------------------------------------


def test_the_demo_answers_and_stops_its_server():
    # conftest.py sets engines up for this process; the demo's server is to run as it does for everybody
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_ENABLE_V1")}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dlm.demo"], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for question in questions():
        assert done.stdout.count(f"\n{question.title}: ") == 2  # once per pass
    assert done.stdout.count("[right]") >= 6
    assert done.stdout.count("tokens/s") == 3  # of the canvas that is shown, and of each pass


def script(code: str) -> Server:
    server = Server()
    server.command = [sys.executable, "-c", code]
    return server


def test_a_server_that_dies_shows_its_last_words():
    dying = script("print('out of luck'); raise SystemExit(3)")
    with pytest.raises(ServerError, match="status 3\nout of luck"), dying as server:
        server.wait(60)


def test_a_server_that_never_gets_ready_is_stopped():
    sleeping = script("import time; time.sleep(600)")
    with pytest.raises(ServerError, match="not ready after 0 s"), sleeping as server:
        server.wait(0.1)
    assert server.process.returncode is not None


def test_what_a_dead_server_leaves_behind_is_stopped():
    helper = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid"
    dying = script(f"import subprocess, sys; print({helper}); raise SystemExit(3)")
    with pytest.raises(ServerError) as died, dying as server:
        server.wait(60)
    status = Path(f"/proc/{str(died.value).split()[-1]}/stat")
    for _ in range(100):
        # nobody may have collected the orphan yet
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the helper still runs")


def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port}"):
            Server(port=port)


def chunk(text: str, tokens: int, finish_reason: str | None = None) -> dict:
    return {
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1},
    }


@pytest.fixture
def answered():
    """answered(*events, status) -> what the client makes of a server that sends these"""
    with ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def answered(*events: dict | str, status: int = 200) -> list[tuple]:
            server.status, server.events = status, events
            url = f"http://127.0.0.1:{server.server_port}"
            stream = client.stream(url, client.body("m", "Copy: a", 16, {"dlm_steps": 4}))
            return [(progress.text, progress.tokens, progress.finish_reason) for progress in stream]

        answered.server = server
        yield answered
        server.shutdown()


class Canned(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.status)
        self.send_header("Content-Type", "text/event-stream" if self.server.status == 200 else "application/json")
        self.end_headers()
        for event in self.server.events:
            text = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {text}\n\n".encode() if self.server.status == 200 else text.encode())

    def log_message(self, *_): ...


def test_a_stream_is_read_event_by_event(answered):
    seen = answered(chunk(" a b", 8), chunk(" c", 11, "stop"), "[DONE]", chunk("!", 99))
    assert seen == [(" a b", 8, None), (" a b c", 11, "stop")]
    asked = answered.server.asked
    assert asked["stream"] and asked["vllm_xargs"] == {"dlm_steps": 4} and asked["max_tokens"] == 16


def test_an_error_inside_a_stream_is_raised(answered):
    with pytest.raises(client.RequestError, match=r"^dlm_steps: too few$"):
        answered(chunk(" a", 1), {"error": {"message": "dlm_steps: too few"}})


def test_a_refusal_is_raised_with_its_message(answered):
    with pytest.raises(client.RequestError, match=r"^HTTP 400: dlm_steps: too few$"):
        answered({"error": {"message": "dlm_steps: too few", "code": 400}}, status=400)


def test_an_answer_that_breaks_off_is_no_answer(answered):
    with pytest.raises(client.RequestError, match="without a finish reason"):
        answered(chunk(" a", 1))


def test_nobody_there_is_said_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(client.RequestError, match="connection lost"):
        list(client.stream(url, client.body("m", "Copy: a", 16, {})))
