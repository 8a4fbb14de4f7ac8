"""Base classes of methods stay small enough to be read at once."""

import inspect

import pytest

from vllm_dlm.methods import KINDS, _package
from vllm_dlm.plugins.decoding import roles as decoding_roles
from vllm_dlm.plugins.reuse import roles as reuse_roles

MOST_MEMBERS = 12
BASES = [each for kind in KINDS for each in inspect.getmro(_package(kind).BASE) if each is not object]
ROLES = [
    each
    for roles in (decoding_roles, reuse_roles)
    for each in vars(roles).values()
    if inspect.isclass(each) and each.__module__ == roles.__name__
]


def members(base: type) -> set[str]:
    """Names that a class defines or declares itself: options, attributes and methods, private ones, too"""
    own = {name for name in vars(base) if not (name.startswith("__") and name.endswith("__"))}
    return own | set(inspect.get_annotations(base))


@pytest.mark.parametrize("base", [*BASES, *ROLES], ids=lambda base: base.__name__)
def test_a_base_class_has_few_members(base):
    found = sorted(members(base))
    print(base.__name__, len(found), *found)
    assert 0 <= len(found) <= MOST_MEMBERS
