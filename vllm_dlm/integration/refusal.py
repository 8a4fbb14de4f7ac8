"""How a request is refused."""

from typing import NoReturn

from vllm.exceptions import VLLMValidationError

from vllm_dlm.shown import short, shown


class Refusal(VLLMValidationError, ValueError):
    """HTTP 400 to the clients of a server, a ValueError to the callers of LLM."""


def refuse(field: str, value, why: str, whole: bool = False) -> NoReturn:
    message = why if whole else f"{short(field)}: {shown(value)} cannot be honoured, {why}"
    # vLLM shows the value once more
    value = None if value is None else shown(value)
    raise Refusal(message, parameter=short(field), value=value)  # type: ignore[call-arg]
