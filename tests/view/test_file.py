"""The page as a file: whole, closed to everything but its own script, and installed."""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from vllm_dlm.methods import KINDS, methods
from vllm_dlm.options import METHOD_KEYS, request_options, server_options
from vllm_dlm.plugins.reuse.roles import WithinBlocks
from vllm_dlm.view.offers import offers
from vllm_dlm.view.page import FOLDER, SCRIPTS, page


def test_it_is_one_file_that_names_no_other():
    text = page()
    addresses = set(re.findall(r"""https?:[^\s"')]+""", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert re.findall(r'(?:src|href)=(?!"data:)', text) == []
    assert "@import" not in text
    assert len(text.encode()) < 100_000


def test_only_its_own_script_may_run():
    text = page()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["connect-src"] == "'self'"


def test_text_of_models_can_only_become_text():
    ways = r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser|setHTML"
    for name in SCRIPTS:
        assert re.findall(ways, (FOLDER / name).read_text()) == [], name


def test_every_part_is_in_the_page_and_in_the_wheel():
    assert set(SCRIPTS) == {path.name for path in FOLDER.glob("*.js")}
    import tomllib

    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vllm_dlm.view"]
    endings = {Path(pattern).suffix for pattern in packed}
    assert {path.suffix for path in FOLDER.iterdir() if path.is_file()} - {".py"} == endings


@pytest.mark.parametrize("attention", ["full", "block_causal"])
def test_what_is_offered_is_taken(attention):
    server = server_options({}, "low_confidence", attention=attention, block_length=32)
    offered = offers(server)
    keys = {kind: key for key, kind in METHOD_KEYS.items()}
    for kind in KINDS:
        for name in offered[kind]:
            chosen = getattr(request_options(server, {keys[kind]: name}), kind)
            assert attention != "full" or chosen.name == name.partition("/")[0]
    assert offered["server"]["decoding"]["block_length"] == 32
    if attention == "full":
        assert {"none", "fast_dllm", "dllm_cache"} <= set(offered["reuse"])
        assert "wino" in offered["decoding"]
    else:
        within = {name for name, cls in methods("reuse").items() if issubclass(cls, WithinBlocks)}
        assert {name.partition("/")[0] for name in offered["reuse"]} == {"none"} | within
        assert offered["extent"] == ["full"] and "unique" in offered["selection"]
        assert "wino" not in offered["decoding"]
