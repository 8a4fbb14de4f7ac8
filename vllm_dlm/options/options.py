"""The options of a server or a request: four methods, bounds of the canvas, limits, texts and flags."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from vllm_dlm.options.limits import DEFAULT_LIMITS, Limits
from vllm_dlm.options.texts import NO_TEXTS, CanvasTexts
from vllm_dlm.options.types import OptionError, reject
from vllm_dlm.plugins.decoding.roles import ShadowingDecoding, SpeculativeDecoding
from vllm_dlm.plugins.reuse.roles import WithinBlocks
from vllm_dlm.shown import shown


@dataclass(frozen=True)
class CanvasBounds:
    """Bounds on the length of a response. Every step computes all of it, so a server limits the cost."""

    name: ClassVar[str] = "canvas"

    default: int | None = None  # for requests without max_tokens; None: the checkpoint's or its family's
    max: int | None = None  # upper bound for all requests

    def __post_init__(self):
        for field in ("default", "max"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {shown(value)} is not valid, it must be at least 1")
        if self.default is not None and self.max is not None and self.default > self.max:
            raise ValueError(f"default: {shown(self.default)} is not valid, it must be at most max, {self.max}")

    def length(self, usual: int) -> int:
        """Response length of a request without max_tokens. `usual`: the model's default"""
        length = usual if self.default is None else self.default
        return length if self.max is None else min(length, self.max)


@dataclass(frozen=True)
class Options:
    """Methods and flags of a request. The fields of methods are in the classes in plugins/."""

    decoding: Any
    reuse: Any
    selection: Any
    extent: Any
    canvas: CanvasBounds = CanvasBounds()
    limits: Limits = DEFAULT_LIMITS
    attention: str = "full"  # the model's mask kind, see Family
    infill: bool | None = None  # masks of the prompt are filled; None: only in prompts of token ids
    frames: bool = False  # the stream includes the result of each step, see view/
    watch: bool = False  # others may watch the request
    trajectory: bool = False  # the response includes the step that filled each token
    texts: CanvasTexts = NO_TEXTS

    @property
    def caches(self) -> bool:
        """Whether keys and values are written to KV blocks, for later steps or for a selection or shadow of the same
        step."""
        shadows, kept = isinstance(self.decoding, ShadowingDecoding), self.attention != "full"
        return self.reuse.caches or self.selection.sparse or shadows or kept

    @property
    def grows(self) -> bool:
        """Whether a canvas starts small and grows, so that its length is an upper bound and may be omitted."""
        return self.extent.grows or self.attention != "full"

    @property
    def observed(self) -> bool:
        """Whether the request's steps are reported"""
        return self.frames or self.watch

    @property
    def canvases(self) -> int:
        """Maximum number of canvases of a request in one step, see canvas/speculation.py. Nothing is speculated with
        guidance or a selection."""
        alone = self.reuse.block_alone and not self.selection.sparse and not self.decoding.cfg_scale
        return self.decoding.drafts if alone and isinstance(self.decoding, SpeculativeDecoding) else 1

    def canvas_length(self, prompt_len: int, max_tokens: int, max_model_len: int) -> int:
        """Number of positions of a request's canvas, including its prompt; at most the model's length. With
        block-causal attention it is a multiple of the block length, except that the last block may end at the model's
        length."""
        length = min(prompt_len + max_tokens, max_model_len)
        if self.attention == "full":
            return length
        width = self.decoding.block_length
        return min(-(-length // width) * width, max_model_len)

    def blocks(self, prompt_len: int, length: int) -> list[tuple[int, int]]:
        """[start, end) of each canvas block within the response"""
        if self.attention == "full":
            return self.decoding.blocks(length - prompt_len)
        width = self.decoding.block_length
        ends = [*range(width * (prompt_len // width + 1), length, width), length]
        return list(pairwise([0, *(end - prompt_len for end in ends)]))


def suited(options: Options, prefix: str = "dlm_") -> Options:
    """Checks options against the model's attention. `prefix`: prefix of field names in errors"""
    if options.attention == "full":
        return options
    whole = "is not supported: it requires attention to the whole canvas, and this model is block-causal"
    reasons = {
        "reuse": "is not supported: this model is block-causal and recomputes no finished block, so it must be 'none'",
        "extent": whole,
    }
    for kind, only in (("reuse", "none"), ("extent", "full")):
        method = getattr(options, kind)
        if (name := method.name) != only and not isinstance(method, WithinBlocks):
            raise OptionError(f"{prefix}{kind}", f"{prefix}{kind}: {name!r} {reasons[kind]}")
    decoding = options.decoding
    if decoding.block_length is None:
        raise OptionError(
            "dlm_block_length",
            "dlm_block_length: None is not valid, this model requires the length of its canvas blocks",
        )
    if isinstance(decoding, ShadowingDecoding):
        raise OptionError("dlm_decoding", f"dlm_decoding: {options.decoding.name!r} {whole}")
    if field := options.texts.any:
        why = "this model is block-causal, so a canvas block does not attend to later positions"
        reject(f"dlm_{field}", getattr(options.texts, field), why)
    return options
