"""What README and docs say: links lead somewhere, files are there, examples are valid, fields and quotations true."""

import ast
import json
from dataclasses import MISSING, fields
from itertools import pairwise

import pytest

from tests.docs.pages import PAGES, ROOT, anchor, examples, headings, links, named_paths, tables_by_section, words
from vllm_dlm.families import FAMILIES
from vllm_dlm.methods import methods
from vllm_dlm.options import OptionError, Options, request_keys, request_options, server_options

PAGE_NAMES = [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not place or place in map(anchor, headings(target)), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_files_that_are_named_are_there(page):
    missing = [path for path in named_paths(page) if not (ROOT / path).exists()]
    assert not missing, f"{page.name}: {missing}"


def test_every_page_of_docs_is_in_the_readme():
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= linked


# -- examples ------------------------------------------------------------------------------------


def server(given: dict) -> Options:
    """Of a family that takes it."""
    try:
        return server_options(given, "low_confidence", FAMILIES["LLaDAModelLM"].presets)
    except OptionError:
        return server_options(given, "entropy", FAMILIES["DreamModel"].presets)


def options_given() -> list[tuple[str, dict, dict]]:
    """(page, the server's object, a request's options) of every example that has either."""
    found = []
    for page, language, text in examples():
        if language == "json":
            found.append((page, json.loads(text), {}))
        elif language == "python":
            keywords = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.keyword)]
            given = {node.arg: ast.literal_eval(node.value) for node in keywords if isinstance(node.value, ast.Dict)}
            if {"additional_config", "extra_args"} & set(given):
                found.append((page, given.get("additional_config", {}).get("dlm", {}), given.get("extra_args", {})))
        elif not language:
            for word, value in pairwise(words(text)):
                if word == "--dlm-config":
                    found.append((page, json.loads(value), {}))
                elif word == "-d":
                    found.append((page, {}, json.loads(value)["vllm_xargs"]))
    return found


def test_examples_of_options_are_valid():
    given = options_given()
    assert len(given) >= 8, "the examples are not found where they were"
    for page, asked, request in given:
        try:
            request_options(server(asked), request)
        except OptionError as error:
            pytest.fail(f"{page}: {asked or request}: {error}")


def test_quotations_are_the_codes():
    """A Python example that begins with a file's name has lines of that file, in order."""
    quoted = [example for example in examples() if example.language == "python" and example.text.startswith("# ")]
    assert quoted
    for page, _, text in quoted:
        name, *lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        code = (" ".join(line.split()) for line in (ROOT / name.removeprefix("# ")).read_text().splitlines())
        there = {line: any(line == own for own in code) for line in lines}
        assert all(there.values()), f"{page}: {name} has not, or elsewhere: {[x for x in there if not there[x]]}"


# -- fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reuse", "selection"])
def test_fields_and_defaults_are_those_of_the_methods(kind):
    page = ROOT / "docs" / f"{kind}.md"
    tables = tables_by_section(page)
    for name, cls in methods(kind).items():
        if not cls.__module__.startswith("vllm_dlm."):
            continue
        said = {row[0].strip("`"): json.loads(row[1].strip("`")) for row in tables.get(f"`{name}`", [])}
        true = {field.name: field.default for field in fields(cls)}
        assert MISSING not in true.values()
        assert said == json.loads(json.dumps(true)), f"{page.name}: `{name}`"
        for preset in cls.presets:
            assert preset in page.read_text() or all(part in page.read_text() for part in parts(preset)), preset


def parts(preset: str) -> list[str]:
    """A model's name is `model-…` on the page, and the task stands beside it."""
    model, _, task = preset.partition("-")
    size, _, task = task.partition("-")
    return [f"`{model}-{size}-…`", f"`{task}`"]


def test_every_option_of_a_request_is_on_the_page():
    rows = tables_by_section(ROOT / "docs/options.md")["Of a request"]
    said = {name.strip("`") for row in rows for name in row[0].split(", ")}
    decodings = [cls for cls in methods("decoding").values() if cls.__module__.startswith("vllm_dlm.")]
    assert said == {key for cls in decodings for key in request_keys(cls())}
    text = " ".join(row[3] for row in rows)
    assert all(f"`{cls.name}`" in text for cls in decodings)


def test_every_method_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for kind in ("decoding", "reuse", "selection"):
        own = [name for name, cls in methods(kind).items() if cls.__module__.startswith("vllm_dlm.")]
        assert all(f"`{name}`" in readme for name in own)
