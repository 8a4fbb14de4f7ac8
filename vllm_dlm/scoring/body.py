"""Parses the JSON body of a request for scores, after checking its size and structure.

A parser holds the GIL until it returns, in any thread: 10 MB of short lists take more than a second. The number of
brackets, quotes and commas bounds the number of objects in a body. They are counted in slices.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json

from vllm_dlm.options.limits import Limits
from vllm_dlm.refusal import refuse
from vllm_dlm.scoring.scores import How

#: JSON bytes per unit of `limits.score_characters`: the longest escape has 12, a token id with white space 16
BYTES = 16
#: lists and texts per unit of `limits.score_pairs`; a smaller excess is parsed, and its error names the field
SLACK = 16


async def read_body(raw_request: Request, limits: Limits) -> bytes:
    """Reads the body. One that is too large is read to its end, so that the client gets the response, and dropped."""
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
    most = {"lists and objects": SLACK * limits.score_pairs, "texts": SLACK * limits.score_pairs}
    most["values"] = limits.score_characters + SLACK * limits.score_pairs
    for found in structure(body):
        for kind, number in found.items():
            if number > most[kind]:
                limit = "score_characters" if kind == "values" else "score_pairs"
                refuse_body(f"{number} {kind}", most[kind], limit)


def structure(body: bytes, slice_bytes: int = 1 << 18) -> Iterator[dict[str, int]]:
    """Number of lists and objects, texts, and values of a body up to the end of each slice. Characters within texts do
    not count."""
    found = {"lists and objects": 0, "texts": 0, "values": 0}
    escape, quotes = b"", 0
    for start in range(0, len(body), slice_bytes):
        # Remove pairs of backslashes first, because the second one of a pair escapes nothing.
        bare = (escape + body[start : start + slice_bytes]).replace(rb"\\", b"").replace(rb"\"", b"")
        escape = b"\\" if bare.endswith(b"\\") else b""  # the escaped character is in the next slice
        parts = bare.split(b'"')
        outside = b"".join(parts[quotes % 2 :: 2])
        quotes += len(parts) - 1
        found["texts"] = quotes // 2
        found["lists and objects"] += outside.count(b"[") + outside.count(b"{")
        found["values"] += outside.count(b",")
        yield found


def refuse_body(what: str, most: int, limit: str):
    refuse("body", what, f"at most {most} are allowed (--dlm-config limits.{limit})")
