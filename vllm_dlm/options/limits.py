"""Limits on the cost of one request, or of all clients together, for a server: `--dlm-config '{"limits": {...}}'`.

They bound work on the event loop, memory kept per request and time on the engine's thread to what vLLM itself spends on
a request of the same size. The defaults allow every use that the documentation shows.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

from vllm_dlm.shown import shown


@dataclass(frozen=True)
class Limits:
    """Per request unless a comment says otherwise."""

    name: ClassVar[str] = "limits"

    template_characters: int = 1 << 16  # characters of a dlm_template
    template_holes: int = 512  # holes of a template
    template_automata: int = 32  # distinct `one of` holes of a template
    score_pairs: int = 1024  # pairs of a context and a continuation
    score_characters: int = 1 << 20  # characters of the texts of all pairs; a token id counts as one, each list once
    score_draws: int = 1 << 14  # pairs times mc_num
    followers: int = 64  # per server: connections that watch requests, or read their own frames
    observed: int = 256  # per server: running choices of requests with dlm_frames or dlm_watch

    def __post_init__(self):
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name}: {shown(value)} is not valid, it must be at least 1")


DEFAULT_LIMITS = Limits()
#: limits of `LLM`, where the caller bears the cost of its own requests
UNLIMITED = Limits(**{field.name: 1 << 62 for field in fields(Limits)})
