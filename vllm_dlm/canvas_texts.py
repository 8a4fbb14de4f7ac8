"""What a request says of its canvas in addition to the prompt.

Text becomes tokens in the front-end, which has the tokenizer. The scheduler and
the workers get the tokens, see `Layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm_dlm.shown import shown

Text = str | tuple[int, ...]  # or its token ids


@dataclass(frozen=True)
class CanvasTexts:
    """Options of a request, each named `dlm_<field>`"""

    suffix: Text = ""  # text after the canvas
    template: str = ""  # a text with holes, which is the canvas, see template.py
    start: Text = ""  # text with which the canvas starts, instead of masks
    remask: float | None = None  # share of the starting text that becomes masks, the least probable tokens; None: half

    def __post_init__(self):
        if self.remask is not None and not 0 <= self.remask <= 1:
            raise ValueError(f"remask: {shown(self.remask)} is not valid, it must be between 0 and 1")
        if self.remask is not None and not self.start:
            raise ValueError(f"remask: {shown(self.remask)} is not valid without a starting text, give dlm_start")

    @property
    def any(self) -> str | None:
        """The first field with a value"""
        return next((each.name for each in fields(self) if getattr(self, each.name)), None)


#: option of a request -> its field
TEXT_KEYS = {f"dlm_{each.name}": each.name for each in fields(CanvasTexts)}


@dataclass(frozen=True)
class Layout:
    """How a canvas is laid out, in tokens."""

    suffix: int = 0  # number of tokens at the end of the prompt that come after the canvas
    start: Sequence[int] = ()  # tokens with which the canvas starts: a starting text, or a template
    #: of a template: for each hole where in the canvas it starts, its length, and the number of its automaton
    holes: Sequence[tuple[int, int, int]] = ()
    automata: Sequence[dict] = ()  # see Automaton.plain
    ends: Sequence[int] = ()  # tokens that end a hole; the first of them ends the answer
    remask: float = 0.0  # of a starting text, see CanvasTexts

    @property
    def length(self) -> int:
        """Length of a template's answer, with its end; 0: there is no template"""
        return len(self.start) + 1 if self.holes else 0

    def to_wire(self) -> dict[str, Any]:
        """Its fields, without those that have no value"""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}

    def context(self, prompt: list[int]) -> list[int]:
        """The tokens before the canvas, in the order of rows, see Canvas.positions"""
        return prompt[len(prompt) - self.suffix :] + prompt[: len(prompt) - self.suffix]


NO_LAYOUT = Layout()
NO_TEXTS = CanvasTexts()
