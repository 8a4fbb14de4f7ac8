"""The JSON body of a request for scores, bounded before it is parsed.

A parser holds Python's lock until it is done, in whatever thread it runs: 10 MB of short lists take more than a
second. Counting the brackets, quotes and commas of a body takes less than a tenth of one, and says how many objects
the parser would make.
"""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json

from vllm_dlm.integration.refusal import refuse
from vllm_dlm.limits import Limits
from vllm_dlm.scoring.scores import How

#: bytes of JSON for each of `limits.score_characters`: the longest escape has 12, a token id with white space 16
BYTES = 16
#: how far a body may exceed the limits and still be parsed, so that the error names the field
SLACK_PAIRS, SLACK_CHARACTERS = 16, 2


async def read_body(raw_request: Request, limits: Limits) -> bytes:
    """A body that is too large is read to its end, so that the client gets the answer, and dropped."""
    most, size = BYTES * limits.score_characters + (1 << 16), 0
    parts: list[bytes] = []
    async for part in raw_request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
    if size > most:
        refuse_body(f"{size} bytes", most, "score_characters")
    return b"".join(parts)


def parse_body(body: bytes, limits: Limits, model: type[How]) -> Any:
    check_structure(body, limits)
    try:
        fields = from_json(body)
    except ValueError as error:
        refuse("body", body[:100].decode(errors="replace"), f"it must be a JSON object: {error}")
    if not isinstance(fields, dict):
        refuse("body", fields, "it must be a JSON object")
    for field in fields:
        if field not in model.model_fields:
            refuse(field, fields[field], f"the fields of a request for scores are {', '.join(model.model_fields)}")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None


def check_structure(body: bytes, limits: Limits) -> None:
    bare, most = unescaped(body), SLACK_PAIRS * limits.score_pairs
    if (texts := bare.count(b'"') // 2) > most:
        refuse_body(f"{texts} texts", most, "score_pairs")
    outside = outside_texts(bare)
    if (lists := outside.count(b"[") + outside.count(b"{")) > most:
        refuse_body(f"{lists} lists and objects", most, "score_pairs")
    if (commas := outside.count(b",")) > (most := SLACK_CHARACTERS * limits.score_characters):
        refuse_body(f"{commas} values", most, "score_characters")


def unescaped(body: bytes) -> bytes:
    """JSON without escaped quotes. Pairs of backslashes go first: the second one of a pair escapes nothing."""
    return body.replace(rb"\\", b"").replace(rb"\"", b"")


def outside_texts(bare: bytes) -> bytes:
    """The parts of unescaped JSON that are not in quotes"""
    return b"".join(bare.split(b'"')[::2])


def refuse_body(what: str, most: int, limit: str):
    refuse("body", what, f"at most {most} are allowed, see --dlm-config limits.{limit}")
