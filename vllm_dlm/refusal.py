"""The error that refuses a request."""

from typing import NoReturn

from vllm.exceptions import VLLMValidationError

from vllm_dlm.shown import short, shown

ONLY_DIFFUSION = "it is an option of masked-diffusion language models"


class Refusal(VLLMValidationError, ValueError):
    """HTTP 400 to the clients of a server, a ValueError to the callers of LLM."""


def refuse(field: str, value, why: str, whole: bool = False) -> NoReturn:
    """`whole`: `why` is the whole message"""
    message = why if whole else f"{short(field)}: {shown(value)} cannot be honoured, {why}"
    # vLLM shows the value again
    value = None if value is None else shown(value)
    raise Refusal(message, parameter=short(field), value=value)  # type: ignore[call-arg]
