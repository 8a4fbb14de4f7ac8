"""Parses the options of a request and tokenises its texts. Checks that depend on the prompt are in checks.py."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dlm.options import RENAMED, Options, current_names, request_keys, request_options
from vllm_dlm.options.texts import TEXT_KEYS
from vllm_dlm.options.types import reject
from vllm_dlm.request.served_model import ServedModel
from vllm_dlm.request.texts import TokenisedTexts, check_sizes, tokenise

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only

#: deprecated names that were logged
_NOTED: set[str] = set()
#: keys of `extra_args` that vLLM reads and that do not affect a canvas
READ_BY_VLLM = ("kv_cache_report_mode",)


class UnboundedTemplate(str):
    """A template of a chat without `max_tokens`. vLLM's default value does not bound it."""


@dataclass(frozen=True)
class ParsedRequest:
    written: Mapping[str, Any]  # `extra_args` as the client wrote them
    options: Options
    texts: TokenisedTexts

    @property
    def template_is_bounded(self) -> bool:
        """Whether `max_tokens` bounds the template"""
        return not isinstance(self.written.get("dlm_template"), UnboundedTemplate)


def parse(written: Mapping[str, Any] | None, model: ServedModel) -> ParsedRequest:
    written = dict(written or {})
    check_names(written, model.options)
    note_old_names(written)
    named = current_names(written)
    check_sizes(named, model)
    options = request_options(model.options, named)
    return ParsedRequest(written, options, tokenise(options, model))


def check_names(written: Mapping[str, Any], server: Options) -> None:
    """Rejects extra arguments that are not options of this plugin, so that misspelt ones are not ignored."""
    for field, value in written.items():
        if not field.startswith("dlm_") and field not in READ_BY_VLLM:
            meant = f"dlm_{field}" in request_keys(server.decoding)
            unread = "it is unknown; options of masked-diffusion language models start with dlm_"
            reject(field, value, f"write dlm_{field}" if meant else unread)


def has_texts(written: Mapping[str, Any]) -> bool:
    """Whether the request has texts to tokenise"""
    return any(RENAMED.get(name, name) in TEXT_KEYS for name in written)


def note_old_names(written: Mapping[str, Any]) -> None:
    """Logs each deprecated name once per process."""
    for old in (RENAMED.keys() & written) - _NOTED:
        _NOTED.add(old)
        logger.warning("%s is deprecated and will be removed; use %s", old, RENAMED[old])
