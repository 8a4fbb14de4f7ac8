"""vLLM is changed in one place, once, and not at all where it is not the vLLM that was read."""

import ast
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.serving import WITHOUT_A_WORKER, vllm_environment
from tests.page_sparse.models import write
from tests.tiers import slow
from vllm_dlm.integration import install
from vllm_dlm.integration.patches import PATCHES, WRITES
from vllm_dlm.integration.patching import Patch, WhenImported, mismatch, owner_of, wrap

ROOT = Path(__file__).resolve().parents[2]
#: set on objects that are not vLLM's: the configuration of transformers
OF_OTHERS = {"eot_token_id"}


class Theirs:
    def method(self, a, b=2):
        return a + b

    @staticmethod
    def static(a):
        return a

    @classmethod
    def of_class(cls, a):
        return cls, a


def doubled(function):
    def twice(*args, **kwargs):
        result = function(*args, **kwargs)
        return result * 2 if isinstance(result, int) else (*result, "again")

    return twice


def patch(name: str, signature: str, owner: str = f"{__name__}:Theirs") -> Patch:
    return Patch(owner, name, doubled, "a test", (signature,))


def test_a_wrapper_takes_its_place_once():
    class Kept(Theirs):
        pass

    for name, signature in {"method": "(self, a, b=)", "static": "(a)", "of_class": "(cls, a)"}.items():
        row = patch(name, signature)
        for _ in range(2):
            assert mismatch(row) is None  # before and after
            wrap(row)
    assert Theirs().method(1) == 6 and Theirs.static(3) == 6
    assert Kept.of_class(1) == (Kept, 1, "again")


@pytest.mark.parametrize(
    "row, said",
    [
        (patch("method", "(self, a)"), "Theirs.method has the signature (self, a, b=)"),
        (patch("gone", "(self)"), "Theirs.gone does not exist"),
        (patch("method", "(self)", "vllm.no_module:Theirs"), "vllm.no_module:Theirs.method does not exist"),
        (
            patch("gone", "(self)", "vllm.entrypoints.serve.engine.serving:BaseServing"),
            "BaseServing.gone does not exist",
        ),
    ],
)
def test_what_is_not_as_expected_is_named(row, said):
    assert said in mismatch(row)
    if row.module.startswith("vllm."):  # what is not imported is looked up in its source
        assert said in mismatch(replace(row, at="import"))


@pytest.mark.parametrize("row", PATCHES, ids=lambda row: f"{row.owner.rpartition(':')[2]}.{row.name}")
def test_source_and_memory_agree(row):
    assert mismatch(replace(row, at="worker")) is None
    importlib.import_module(row.module)
    assert mismatch(row) is None


def test_installing_again_changes_nothing():
    install()
    before = [getattr(owner_of(row), row.name) for row in PATCHES]
    finders = [finder for finder in sys.meta_path if isinstance(finder, WhenImported)]
    install()
    assert [getattr(owner_of(row), row.name) for row in PATCHES] == before
    assert [finder for finder in sys.meta_path if isinstance(finder, WhenImported)] == finders


# -- attributes that are set -----------------------------------------------------------------


def written_attributes(path: Path) -> set[str]:
    """Attributes of other objects than `self` that a file sets, and names of modules whose entries it sets"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in (part for each in targets for part in getattr(each, "elts", [each])):
            if isinstance(target, ast.Attribute) and not (
                isinstance(target.value, ast.Name) and target.value.id == "self"
            ):
                found.add(target.attr)
            elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name) and target.value.id.isupper():
                found.add(target.value.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add":
            found |= {node.func.value.attr} if isinstance(node.func.value, ast.Attribute) else set()
    return {name for name in found if not name.startswith("dlm_")}


@pytest.mark.parametrize("file", sorted({row.file for row in WRITES}))
def test_every_attribute_that_is_set_has_a_row(file):
    listed = {name for row in WRITES if row.file == file for name in row.names}
    assert written_attributes(ROOT / "vllm_dlm" / file) - OF_OTHERS == listed


# -- a vLLM that is not the one that was read ------------------------------------------------


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory) -> str:
    return str(write("llama", tmp_path_factory.mktemp("llama")))


#: case -> (what every process does as it starts, arguments, what the line says)
CASES = {
    "another version": (
        "from vllm_dlm.integration import gate; gate.SUPPORTED = (0, 7), (0, 9)",
        ["generate"],
        "it supports vLLM 0.7 and 0.8, not 0.32",
    ),
    "a missing attribute": ("", ["lose"], "vllm.engine.arg_utils:EngineArgs.from_cli_args does not exist"),
    "a broken import": (
        "import sys; sys.modules['vllm_dlm.integration.bodies'] = None",
        [],
        "ModuleNotFoundError: import of vllm_dlm.integration.bodies halted",
    ),
}


def run(tmp_path, autoregressive: str, *arguments: str, at_start: str = "") -> tuple[dict, list[str]]:
    """What a process of standing_aside.py answers, and the lines it writes"""
    (tmp_path / "sitecustomize.py").write_text(at_start)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.standing_aside", autoregressive, *arguments],
        cwd=ROOT,
        env=vllm_environment() | WITHOUT_A_WORKER | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    (line,) = [line for line in lines if line.startswith("answer: ")]
    return json.loads(line.removeprefix("answer: ")), [other for other in lines if other is not line]


@pytest.mark.parametrize("case", ["a missing attribute", *slow("another version", "a broken import")])
def test_in_another_vllm_nothing_is_touched(tmp_path, autoregressive, case):
    at_start, arguments, said = CASES[case]
    answer, lines = run(tmp_path, autoregressive, *arguments, at_start=at_start)
    assert answer["patched"] == [] and "--dlm-config" not in answer["flags"]
    assert "generate" not in arguments or len(answer["tokens"]) == 4
    # vLLM says itself that it does not have a model, and another plugin may have it
    assert "Transformers does not recognize" in answer["diffusion model"]
    assert "vllm_dlm" not in answer["diffusion model"]
    assert answer["another plugin's"][0] == "TheirConfig"
    # that vLLM would take a diffusion model for an autoregressive one is the one thing prevented
    assert "SDARForCausalLM: vLLM's Transformers backend would serve" in answer["remote code"]
    written = [line for line in lines if "is inactive" in line]
    assert len(written) == 1 and said in written[0]


def test_a_model_that_another_plugin_serves_is_left_to_it(tmp_path, autoregressive):
    answer, lines = run(tmp_path, autoregressive, "another")
    assert answer["patched"] and "--dlm-config" in answer["flags"]
    assert answer["another plugin's"][0] == "TheirConfig" and "vllm_dlm" not in answer["another plugin's"][1]
    assert "SDARForCausalLM: config.json has no " in answer["remote code"]  # still this plugin's
    written = [line for line in lines if "does not serve models of type 'llada'" in line]
    assert len(written) == 1 and "is inactive" not in "".join(lines)
