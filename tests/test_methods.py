"""What other packages register: methods by the kind of their base, and nothing else."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from vllm_dlm import methods as registry
from vllm_dlm.methods import KINDS, methods
from vllm_dlm.plugins.decoding.low_confidence import LowConfidence
from vllm_dlm.plugins.reuse.none import Dense


@dataclass(frozen=True)
class Slow(Dense):
    name: ClassVar[str] = "slow"


@dataclass(frozen=True)
class SecondOfItsName(LowConfidence):
    name: ClassVar[str] = "low_confidence"


@pytest.fixture
def register(monkeypatch):
    def register(thing: str) -> None:
        point = EntryPoint("mine", f"{__name__}:{thing}", registry.GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        methods.cache_clear()

    yield register
    monkeypatch.undo()
    methods.cache_clear()


def test_a_method_joins_those_of_its_kind(register):
    bundled = {kind: methods(kind) for kind in KINDS}
    register("Slow")
    assert {kind: methods(kind) for kind in KINDS} == bundled | {"reuse": bundled["reuse"] | {"slow": Slow}}


@pytest.mark.parametrize("thing", ["pytest", "EntryPoint", "KINDS"])
def test_what_is_no_method_is_refused(register, thing):
    register(thing)
    with pytest.raises(
        ValueError, match=rf"mine = .*:{thing} is not a Decoding or Reuse or Selection or Extent with a name"
    ):
        methods("reuse")


def test_two_methods_of_one_name_are_refused(register):
    register("SecondOfItsName")
    with pytest.raises(ValueError, match=r"'low_confidence' is the name of two methods, .*LowConfidence and .*Second"):
        methods("decoding")
