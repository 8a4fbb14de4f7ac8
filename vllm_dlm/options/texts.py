"""Texts of a request in addition to its prompt: suffix, starting text, template.

The front-end tokenises them. The scheduler and the workers get the tokens, see
`Layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm_dlm.shown import shown

Text = str | tuple[int, ...]  # a text, or its token ids


@dataclass(frozen=True)
class CanvasTexts:
    """Options of a request, named `dlm_<field>`"""

    suffix: Text = ""  # text after the canvas
    template: str = ""  # text with holes that is the whole canvas, see template.py
    start: Text = ""  # text with which the canvas starts, instead of masks
    #: share of the starting text that is masked, the least probable tokens first; None: half
    remask: float | None = None

    def __post_init__(self):
        if self.remask is not None and not 0 <= self.remask <= 1:
            raise ValueError(f"remask: {shown(self.remask)} is not valid, it must be between 0 and 1")
        if self.remask is not None and not self.start:
            raise ValueError(f"remask: {shown(self.remask)} is not valid, it requires a starting text (dlm_start)")

    @property
    def any(self) -> str | None:
        """The first field with a value"""
        return next((each.name for each in fields(self) if getattr(self, each.name)), None)


#: option of a request -> field of CanvasTexts
TEXT_KEYS = {f"dlm_{each.name}": each.name for each in fields(CanvasTexts)}


@dataclass(frozen=True)
class Layout:
    """Layout of a canvas in tokens."""

    suffix: int = 0  # number of last tokens of the prompt that are placed after the canvas
    start: Sequence[int] = ()  # tokens with which the canvas starts: a starting text, or a template
    #: (start in the canvas, length, index of the automaton) of each hole of a template
    holes: Sequence[tuple[int, int, int]] = ()
    automata: Sequence[dict] = ()  # see Automaton.plain
    ends: Sequence[int] = ()  # tokens that end a hole; the first of them ends the answer
    remask: float = 0.0  # share of the starting text that is masked

    @property
    def length(self) -> int:
        """Length of a template's answer including its end token; 0 without a template"""
        return len(self.start) + 1 if self.holes else 0

    def to_wire(self) -> dict[str, Any]:
        """Fields that have a value"""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}

    def context(self, prompt: list[int]) -> list[int]:
        """Tokens of the prompt in the order of rows, see Canvas.positions"""
        return prompt[len(prompt) - self.suffix :] + prompt[: len(prompt) - self.suffix]


NO_LAYOUT = Layout()
NO_TEXTS = CanvasTexts()
