"""What every selection of cached keys shares.

A selection describes the cached keys of a prompt once per refresh (`summarise`)
and later picks, for the queries of a step, the units (pages, pairs, tokens) of
the prompt that are attended to (`choose`). Whatever is not prompt is always
visible. Summaries are rows shaped like keys and values, and are kept where
those are: a summary row's first half is a mean of keys, its second a spread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass
class Choice:
    """What was chosen of one canvas's prompt in one layer."""

    units: torch.Tensor  # [Hkv, K] int32, ascending
    scored: int  # summaries and keys that were compared with the queries
    memo: torch.Tensor | None = None  # for the selection's next choice


@dataclass
class Asked:
    """One canvas, in one layer, whose queries want to know what to read."""

    q: torch.Tensor  # [n, H, D]
    voters: torch.Tensor  # [n] bool: rows whose token is about to be decided
    summary: torch.Tensor  # [Hkv, R, 2 * D], what `summarise` made
    # runs [Hkv, m] of so many neighbours -> their cached keys and values [Hkv, m, size, 2 * D]
    read: Callable[[torch.Tensor, int], torch.Tensor]
    prompt_len: int
    length: int  # prompt and response
    scale: float
    previous: Choice | None  # what was chosen last, if the prompt has not been refreshed since

    def electing(self, query_set: str) -> torch.Tensor:
        """Queries of all rows ("active") or of those to be decided ("masked"), if there are any."""
        return self.q[self.voters] if query_set == "masked" and bool(self.voters.any()) else self.q


@dataclass(frozen=True)
class Selection:
    name: ClassVar[str | None] = None
    #: field values chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: leaves keys out at all
    sparse: ClassVar[bool] = True
    #: also decodes autoregressive models (see vllm_dlm/page_sparse)
    autoregressive: ClassVar[bool] = False

    #: these layers read everything
    dense_layers: ClassVar[tuple[int, ...]] = ()

    @property
    def unit(self) -> int:
        """Neighbouring tokens that are read or left out together; divides every block size."""
        raise NotImplementedError

    def applies(self, prompt_len: int, length: int) -> bool:
        """Whether anything of such a canvas would be left out."""
        raise NotImplementedError

    def chosen_from(self, prompt_len: int) -> int:
        """Tokens of the prompt that may be left out: the first so many. A multiple of `unit`."""
        return prompt_len // self.unit * self.unit

    def summary_rows(self, prompt_len: int) -> int:
        raise NotImplementedError

    def summarise(self, keys: torch.Tensor) -> torch.Tensor:
        """The prompt's cached keys [N, Hkv, D] -> [R, Hkv, 2 * D]"""
        raise NotImplementedError

    def choose(self, asked: Asked) -> Choice:
        """Units of the prompt to read. Those not wholly inside it are none of its business: they are read anyway."""
        raise NotImplementedError

    def keeps(self, steps: int) -> bool:
        """Whether a choice that has served so many steps serves another one. (A refresh of the prompt ends it.)"""
        return False
