"""What this package changes in vLLM, overrides, or calls is as it was read, in every supported version.

The facts of a version lie in vllm_signatures/ and are made by `python -m tools.vllm_signatures`. A test that fails
here says what moved: read that place in vLLM, mend what relies on it, and make the files of all versions again.
"""

import json

import pytest
import vllm

from tools import vllm_signatures
from vllm_dlm.integration.gate import SUPPORTED
from vllm_dlm.integration.overrides import BUILT_ON, READ
from vllm_dlm.integration.patches import PATCHES

FACTS = {path.stem: json.loads(path.read_text()) for path in sorted(vllm_signatures.FILES.glob("*.json"))}


def test_every_supported_version_has_its_facts():
    (major, first), (_, end) = SUPPORTED
    assert [version.rpartition(".")[0] for version in FACTS] == [f"{major}.{minor}" for minor in range(first, end)]


def test_the_vllm_that_is_installed_is_as_it_was_read():
    version = vllm.__version__.split("+")[0]
    assert vllm_signatures.facts(vllm_signatures.installed()) == FACTS[version]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: f"{patch.owner.rpartition(':')[2]}.{patch.name}")
def test_a_patch_was_written_for_what_each_version_has(patch):
    read = {facts[f"{patch.owner}.{patch.name}"] for facts in FACTS.values()}
    assert read == set(patch.signatures)


def test_nothing_moved_that_nobody_has_looked_at():
    patched = {f"{patch.owner}.{patch.name}" for patch in PATCHES}
    first, *others = FACTS.values()
    moved = {place for other in others for place in first | other if first.get(place) != other.get(place)}
    assert moved - patched == set(READ)


def test_all_that_is_used_is_there():
    for version, facts in FACTS.items():
        assert [place for place, found in facts.items() if found == "not there"] == [], version


@pytest.mark.parametrize("own, base", BUILT_ON, ids=lambda path: path.rpartition(":")[2])
@pytest.mark.parametrize("version", FACTS)
def test_what_overrides_a_method_takes_what_vllm_gives(version, own, base):
    for name, signature in vllm_signatures.Package(vllm_signatures.ROOT / "vllm_dlm").members(own).items():
        given = FACTS[version].get(f"{base}.{name}", "")
        if "(" in given and "(" in signature and name != "__init__":
            assert takes(words(signature), words(given)), f"{own}.{name}{signature} in the place of {given}"


def words(signature: str) -> list[str]:
    return signature.partition("(")[2].rstrip(")").split(", ")


def takes(own: list[str], given: list[str]) -> bool:
    """Whatever is given by its place, and by its name what may be left out or has no place."""
    places, named = [word for word in given if not word.endswith("=")], [word for word in given if word.endswith("=")]
    starred = any(word.startswith("*") and word[1:2].isalpha() for word in own)
    by_name = any(word.startswith("**") for word in own) or {word.rstrip("=") for word in named} <= {
        word.rstrip("=") for word in own
    }
    return by_name and (starred or len(own) >= len(places))
