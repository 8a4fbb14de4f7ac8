"""The error for requests that are rejected."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from vllm.exceptions import VLLMValidationError

from vllm_dlm.options import RENAMED
from vllm_dlm.options.types import OptionError, unsupported
from vllm_dlm.shown import short, shown

ONLY_DIFFUSION = "it is an option of masked-diffusion language models"


class Refusal(VLLMValidationError, ValueError):
    """HTTP 400 for clients of a server, a ValueError for callers of LLM."""


def refuse(field: str, value, why: str, whole: bool = False) -> NoReturn:
    """Raises Refusal. `whole`: `why` is the complete message"""
    message = why if whole else unsupported(field, value, why)
    # vLLM appends the value to the message
    value = None if value is None else shown(value)
    raise Refusal(message, parameter=short(field), value=value)  # type: ignore[call-arg]


@contextmanager
def refusals(written: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turns an OptionError into a Refusal. `written`: options of a request under the names that the client used"""
    try:
        yield
    except OptionError as error:
        written, field, message = written or {}, error.field, str(error)
        for old in (old for old, name in RENAMED.items() if name == error.field and name not in written):
            field, message = (old, message.replace(error.field, old, 1)) if old in written else (field, message)
        refuse(field, written.get(field) if error.value is None else error.value, message, whole=True)
