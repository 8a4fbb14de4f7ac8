"""Converts the value of an option to the type of its dataclass field.

pydantic checks values in strict mode: it accepts neither strings for numbers nor
numbers for strings. Only forms that HTTP and JSON require are converted first:
0 and 1 to booleans, whole floats to integers, "none" to None, lists to tuples.
"""

import typing
from functools import cache, partial, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from vllm_dlm.shown import short, shown

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
#: bound on the magnitude of integers, above any useful value; larger ones would overflow in numpy and torch
LARGEST = 2**62


class OptionError(ValueError):
    """A value that is not supported. `field` is the name that the caller used, `value` the value if it is known."""

    def __init__(self, field: str, message: str, value: Any = None):
        super().__init__(message)
        self.field, self.value = field, value


def reject(field: str, value: Any, why: str) -> NoReturn:
    raise OptionError(field, unsupported(field, value, why), value)


def unsupported(field: str, value: Any, why: str) -> str:
    """Error message for a value that is not supported"""
    return f"{short(field)}: {shown(value)} is not supported: {why}"


def typed(cls: type, field: str, value: Any, where: str) -> Any:
    """Converts `value` to the type of `cls.field`. Errors name the option `where`."""
    try:
        return _adapter(cls, field).validate_python(value)
    except ValidationError as error:
        places = _places(error)
    wrong, wanted = value, typing.get_type_hints(cls)[field]
    for place in places:
        wrong, wanted = wrong[place], _element(wanted, place)
    named = "".join([where, *(f"[{place}]" for place in places)])
    raise OptionError(where, f"{named}: {shown(wrong)} is not valid, it must be {_in_words(wanted)}")


def may_be_unset(cls: type, field: str) -> bool:
    return NoneType in _alternatives(typing.get_type_hints(cls)[field])


@cache
def _adapter(cls: type, field: str) -> TypeAdapter:
    return TypeAdapter(_as_sent(typing.get_type_hints(cls)[field]), config=STRICT)


def _as_sent(hint: Any) -> Any:
    """The type `hint` with converters for the forms in which clients send its values."""
    kinds = _alternatives(hint)
    if len(kinds) > 1:
        sent = reduce(or_, map(_as_sent, kinds))
        return Annotated[sent, BeforeValidator(_none)] if NoneType in kinds else sent
    if _is_list(hint):
        origin, elements = typing.get_origin(hint), typing.get_args(hint)
        inside = tuple(element if element is Ellipsis else _as_sent(element) for element in elements)
        return Annotated[origin[inside], BeforeValidator(partial(_list, origin))]
    if hint is bool:
        return Annotated[bool, BeforeValidator(_bool)]
    if hint is int:
        return Annotated[int, Field(gt=-LARGEST, lt=LARGEST), BeforeValidator(_int)]
    return hint


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value == "none" else value


def _bool(value: Any) -> Any:
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def _int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list(origin: type, value: Any) -> Any:
    return origin(value) if isinstance(value, list | tuple) else value


# -- error messages --------------------------------------------------------------------------


def _places(error: ValidationError) -> list[int]:
    """Indices of the first invalid element in nested lists; empty if the value is invalid as a whole.

    If a value may have several types, the most deeply nested error is the most informative one."""
    found = [
        [place for place in each["loc"] if isinstance(place, int)]
        for each in error.errors(include_url=False, include_context=False, include_input=False)
        if each["type"] != "missing"
    ]
    return max(found, key=len, default=[])


def _alternatives(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) in (list, tuple)


def _element(hint: Any, place: int) -> Any:
    elements = next(typing.get_args(kind) for kind in _alternatives(hint) if _is_list(kind))
    return elements[0] if len(elements) == 1 or elements[-1] is Ellipsis else elements[place]


def _in_words(hint: Any) -> str:
    """Description of a type, with lists last: "float or a list of float"."""
    return " or ".join(map(_kind_in_words, sorted(_alternatives(hint), key=_is_list)))


def _kind_in_words(kind: Any) -> str:
    if kind is NoneType:
        return '"none"'
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if _is_list(kind):
        elements = [element for element in typing.get_args(kind) if element is not Ellipsis]
        return f"a list of {', '.join(map(_in_words, elements))}"
    return getattr(kind, "__name__", str(kind))
