"""What a request gives of its canvas beside the prompt.

Text becomes tokens in the front-end, which has the tokenizer. The scheduler and
the workers get the tokens, see `Layout`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm_dlm.shown import shown

Text = str | tuple[int, ...]  # or its token ids


@dataclass(frozen=True)
class Given:
    """As the request says it, each as `dlm_<field>`."""

    suffix: Text = ""  # what comes behind the canvas
    template: str = ""  # a text with holes, which is the canvas, see template.py
    draft: Text = ""  # what the canvas starts with instead of masks
    remask: float | None = None  # share of the draft's tokens that become masks, the least probable ones; None: half

    def __post_init__(self):
        if self.remask is not None and not 0 <= self.remask <= 1:
            raise ValueError(f"remask: {shown(self.remask)} is not valid, it must be between 0 and 1")
        if self.remask is not None and not self.draft:
            raise ValueError(f"remask: {shown(self.remask)} is not valid without a draft, give dlm_draft")

    @property
    def any(self) -> str | None:
        """The first field that says something"""
        return next((each.name for each in fields(self) if getattr(self, each.name)), None)


#: names of a request's fields
GIVEN_KEYS = {f"dlm_{each.name}": each.name for each in fields(Given)}


@dataclass(frozen=True)
class Layout:
    """How a canvas is laid out, in tokens."""

    suffix: int = 0  # so many of the prompt's tokens, the last ones, come behind the canvas
    start: Sequence[int] = ()  # what the canvas starts with
    #: of a template: where in the canvas each hole starts, its length, and which of the automata says what it may hold
    holes: Sequence[tuple[int, int, int]] = ()
    automata: Sequence[dict] = ()  # see Automaton.plain
    ends: Sequence[int] = ()  # tokens that end a hole; the first of them ends the answer
    remask: float = 0.0  # of a draft, see Given

    @property
    def length(self) -> int:
        """Of a template's answer, with its end; 0: there is none"""
        return len(self.start) + 1 if self.holes else 0

    def to_wire(self) -> dict[str, Any]:
        """Its fields, without those that have no value"""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}

    def context(self, prompt: list[int]) -> list[int]:
        """The tokens before the canvas, in the order of rows, see Canvas.positions"""
        return prompt[len(prompt) - self.suffix :] + prompt[: len(prompt) - self.suffix]


NO_LAYOUT = Layout()
NOTHING_GIVEN = Given()
