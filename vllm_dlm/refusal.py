"""The error that refuses a request."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from vllm.exceptions import VLLMValidationError

from vllm_dlm.option_types import OptionError, unsupported
from vllm_dlm.shown import short, shown

ONLY_DIFFUSION = "it is an option of masked-diffusion language models"


class Refusal(VLLMValidationError, ValueError):
    """HTTP 400 to the clients of a server, a ValueError to the callers of LLM."""


def refuse(field: str, value, why: str, whole: bool = False) -> NoReturn:
    """`whole`: `why` is the whole message"""
    message = why if whole else unsupported(field, value, why)
    # vLLM shows the value again
    value = None if value is None else shown(value)
    raise Refusal(message, parameter=short(field), value=value)  # type: ignore[call-arg]


@contextmanager
def refusals(written: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turns an OptionError into a refusal. `written`: values by field, for errors without one"""
    try:
        yield
    except OptionError as error:
        value = (written or {}).get(error.field) if error.value is None else error.value
        refuse(error.field, value, str(error), whole=True)
