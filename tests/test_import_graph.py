"""Packages of vllm_dlm do not import each other in a circle, and the bottom ones do not import vLLM."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "vllm_dlm"


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Modules that a file imports anywhere, also within functions and for type checkers"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> Iterator[tuple[str, Path]]:
    """(package, or module next to the packages; file). plugins/ and kernels/ are links."""
    for place in sorted(ROOT.iterdir()):
        if place.is_dir():
            yield from ((place.name, path) for path in sorted(place.resolve().rglob("*.py")))
        elif place.suffix == ".py" and not place.stem.startswith("__"):
            yield place.stem, place


def import_graph() -> dict[str, set[str]]:
    packages = {name for name, _ in sources()}
    graph: dict[str, set[str]] = {name: set() for name in packages}
    for name, path in sources():
        for module in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            top, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if top == "vllm_dlm" and other in packages - {name}:
                graph[name].add(other)
    return graph


def test_no_circle_between_packages():
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other in a circle: {' -> '.join(error.args[1])}")


def test_a_circle_is_found():
    graph = import_graph()
    graph["kernels"].add("integration")
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_requests_need_neither_vllm_nor_torch():
    for name, path in sources():
        if name == "request":
            modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
            assert not {"torch", "vllm"} & {module.partition(".")[0] for module in modules}, path.name
