"""Values of options: what JSON and HTTP may write for them, and what is said of those that are wrong."""

from dataclasses import dataclass, replace
from typing import Literal

import pytest

from vllm_dlm.families import FAMILIES
from vllm_dlm.options import request_keys, request_options, server_options
from vllm_dlm.options.types import OptionError, reject, typed
from vllm_dlm.refusal import Refusal, refusals
from vllm_dlm.request import parsing
from vllm_dlm.shown import shown


@dataclass(frozen=True)
class Method:
    flag: bool = False
    count: int = 0
    weight: float = 0.0
    word: str = ""
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    layers: tuple[int, ...] = ()
    shares: tuple[float, ...] | float = 0.5
    nested: tuple[tuple[int, ...], ...] = ()


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("flag", True, True), ("flag", 0, False), ("flag", 1, True), ("flag", 1.0, True),
        ("count", 3, 3), ("count", 3.0, 3), ("weight", 2, 2.0), ("weight", 0.25, 0.25), ("word", "none", "none"),
        ("kind", "b", "b"), ("limit", None, None), ("limit", "none", None), ("limit", 4.0, 4),
        ("layers", [0, 1.0], (0, 1)), ("layers", (2,), (2,)), ("layers", [], ()),
        ("shares", [1, 0.5], (1.0, 0.5)), ("shares", 1, 1.0), ("nested", [[1], []], ((1,), ())),
    ],
)  # fmt: skip
def test_values_as_they_are_sent(field, value, wanted):
    found = typed(Method, field, value, field)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("flag", 2, "bool"),
        ("flag", "yes", "bool"),
        ("flag", None, "bool"),
        ("count", True, "int"),
        ("count", "3", "int"),
        ("count", 2.5, "int"),
        ("count", float("nan"), "int"),
        ("weight", True, "float"),
        ("weight", "0.5", "float"),
        ("weight", float("inf"), "float"),
        ("word", 3, "str"),
        ("kind", "c", "'a' or 'b'"),
        ("kind", ["a"], "'a' or 'b'"),
        ("limit", "off", 'int or "none"'),
        ("layers", 3, "a list of int"),
        ("layers", "01", "a list of int"),
        ("shares", "all", "float or a list of float"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(field, value, wanted):
    with pytest.raises(OptionError) as refused:
        typed(Method, field, value, f"dlm.part.{field}")
    assert refused.value.field == f"dlm.part.{field}"
    assert str(refused.value) == f"dlm.part.{field}: {value!r} is not valid, it must be {wanted}"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", ["a", 2.5], "layers[0]: 'a' is not valid, it must be int"),
        ("layers", [0, 2.5], "layers[1]: 2.5 is not valid, it must be int"),
        ("layers", [0, True], "layers[1]: True is not valid, it must be int"),
        ("layers", [0, None], "layers[1]: None is not valid, it must be int"),
        ("shares", [0.5, "b"], "shares[1]: 'b' is not valid, it must be float"),
        ("shares", [float("nan")], "shares[0]: nan is not valid, it must be float"),
        ("nested", [[1], [2, "x"]], "nested[1][1]: 'x' is not valid, it must be int"),
        ("nested", [[1], 2], "nested[1]: 2 is not valid, it must be a list of int"),
    ],
)
def test_a_wrong_element_is_named_with_its_place(field, value, message):
    with pytest.raises(OptionError) as refused:
        typed(Method, field, value, field)
    assert (refused.value.field, str(refused.value)) == (field, message)


@pytest.mark.parametrize("name", ["unique", "wavefilter"])
def test_a_wrong_layer_of_a_selection(name):
    with pytest.raises(OptionError, match=r"^dlm\.selection\.dense_layers\[0\]: 'a' is not valid, it must be int$"):
        server_options({"selection": {"name": name, "dense_layers": ["a", 2.5]}}, "random")


@pytest.mark.parametrize(
    "value",
    ["y" * 10**6, b"y" * 10**6, ["y" * 10**6], list(range(10**6)), 10**4000, [10**5000], {"y" * 10**6: 1}],
    ids=["text", "bytes", "text in a list", "list", "number", "number nobody writes out", "object"],
)
def test_a_large_value_is_shown_in_a_line(value):
    assert 0 < len(shown(value)) <= 100


def test_a_deep_value_is_shown():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) < 50


@pytest.mark.parametrize("name, value", [("low_confidence_dynamic", 0.9), ("token_editing", 0.7)])
def test_a_threshold_that_makes_a_method_comes_with_it(name, value):
    """To a server that has none; what a server says stands, and so does what the request says."""
    plain = server_options(None, "low_confidence")
    assert request_options(plain, {"dlm_decoding": name}).decoding.threshold == value
    assert request_options(plain, {"dlm_decoding": name, "dlm_threshold": "none"}).decoding.threshold is None
    set_ = server_options({"decoding": {"threshold": 0.6}}, "low_confidence")
    assert request_options(set_, {"dlm_decoding": name}).decoding.threshold == 0.6
    own = server_options({"decoding": {"name": name, "threshold": None}}, "low_confidence")
    assert request_options(own, {"dlm_decoding": name}).decoding.threshold is None


def test_a_canvas_is_cut_to_the_models_length():
    options = request_options(server_options(None, "entropy"), {})
    assert options.canvas_length(prompt_len=10, max_tokens=20, max_model_len=512) == 30
    assert options.canvas_length(prompt_len=500, max_tokens=20, max_model_len=512) == 512


def test_a_preset_of_a_family_is_a_server():
    by_blocks = {
        f"{name} with blocks": replace(family, **family.with_block_size)
        for name, family in FAMILIES.items()
        if family.with_block_size
    }
    assert by_blocks
    for architecture, family in (by_blocks | FAMILIES).items():
        attention = family.attention, 4 if family.attention == "block_causal" else None
        for name in family.presets:
            chosen = server_options({"preset": name}, family.decoding, family.presets, *attention)
            assert chosen == server_options(family.presets[name], family.decoding, None, *attention), architecture
        if family.attention != "full":
            continue  # nothing of a window
        own = {"preset": "serve", "decoding": {"threshold": 0.8}, "reuse": {"name": "none"}}
        options = server_options(own, family.decoding, family.presets)
        assert options.decoding.threshold == 0.8 and options.decoding.block_length == 32
        assert options.reuse.name == "none" and options.extent.name == "window"
    with pytest.raises(OptionError, match=r"dlm\.preset: 'fast' is unknown, valid for this model are serve"):
        server_options({"preset": "fast"}, "low_confidence", family.presets)
    with pytest.raises(OptionError, match="valid for this model are none"):
        server_options({"preset": "serve"}, "low_confidence")


def test_an_error_message_costs_no_more_than_it_shows():
    class Counted:
        shown = compared = 0

        def __repr__(self):
            Counted.shown += 1
            return "x"

        def __lt__(self, other):
            Counted.compared += 1
            return id(self) < id(other)

    nested = [[[[Counted()] * 25] * 25] * 25] * 25
    assert len(shown(nested)) <= 100 and Counted.shown < 1000
    Counted.shown = 0
    assert len(shown({Counted(): 1 for _ in range(1000)})) <= 100
    assert Counted.shown < 50 and Counted.compared < 500


RENAMED_OPTIONS = {
    "a decoding": ("dlm_algorithm", "dlm_decoding", "random", "entropy"),
    "a starting text": ("dlm_draft", "dlm_start", " five", " four"),
}


@pytest.mark.parametrize(("old", "name", "value", "other"), RENAMED_OPTIONS.values(), ids=RENAMED_OPTIONS)
def test_an_old_name_means_what_the_new_one_means(old, name, value, other):
    server = server_options(None, "low_confidence")
    wanted = request_options(server, {name: value})
    assert wanted != server
    assert request_options(server, {old: value}) == request_options(server, {old: value, name: value}) == wanted
    with pytest.raises(OptionError, match=f"^{name}: '{other}' differs from '{value}', .* deprecated name {old}$"):
        request_options(server, {old: value, name: other})
    assert name in request_keys(server.decoding) and old not in request_keys(server.decoding)


def test_an_old_name_is_noted_once(monkeypatch):
    noted = []
    monkeypatch.setattr(parsing, "_NOTED", set())
    monkeypatch.setattr(parsing.logger, "warning", lambda message, *names: noted.append(message % names))
    for options in ({"dlm_algorithm": "random"}, {"dlm_algorithm": "entropy", "dlm_draft": "a"}, {"dlm_start": "a"}):
        parsing.note_old_names(options)
    assert noted == [
        "dlm_algorithm is deprecated and will be removed; use dlm_decoding",
        "dlm_draft is deprecated and will be removed; use dlm_start",
    ]


@pytest.mark.parametrize(("old", "name", "value", "_"), RENAMED_OPTIONS.values(), ids=RENAMED_OPTIONS)
def test_a_refusal_speaks_of_the_name_that_the_client_wrote(old, name, value, _):
    for written in (old, name):
        with pytest.raises(Refusal, match=f"^{written}: 3 is not supported: why ") as refused, refusals({written: 3}):
            reject(name, 3, "why")
        assert refused.value.parameter == written
