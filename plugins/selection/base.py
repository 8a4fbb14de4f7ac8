"""What every selection of cached keys shares, whoever asks: a canvas of a diffusion model, or generated positions of
an autoregressive one.

A selection cuts cached keys into units (pages, pairs, tokens), describes them
once (`summarise`: two vectors per unit and key head) and later picks, for the
queries of a step, the units that are read (`choose`). Where the summaries are
kept is the engine's business: a canvas has them in blocks of its request, in
the slots of as many keys and values; the page-sparse engine beside vLLM's KV
cache, by physical page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass
class Summaries:
    """One layer's. `second` is INVALID (see kernels/haar_pyramid) in a unit nobody has described."""

    first: torch.Tensor  # [places, Hkv, W1]
    second: torch.Tensor  # [places, Hkv, W2]

    def by_head(self, table: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the places table [B, N] (None: all of them, in order, B = 1) -> [B, Hkv, N, W1], [B, Hkv, N, W2]"""
        if table is None:
            return self.first.transpose(0, 1)[None], self.second.transpose(0, 1)[None]
        # gathered head by head: products with rows that do not lie side by side are many times slower
        kv_heads = self.first.shape[1]
        row = table[:, None] * kv_heads + torch.arange(kv_heads, device=table.device)[:, None]  # [B, Hkv, N]
        return self.first.flatten(0, 1)[row], self.second.flatten(0, 1)[row]


@dataclass
class Choice:
    units: torch.Tensor  # [B, Hkv, K] int32, ascending
    scored: int  # summaries and keys that were compared with the queries
    memo: torch.Tensor | None = None  # for the selection's next choice


@dataclass
class CachedPrompt:
    """What is known of a canvas beyond its summaries."""

    voters: torch.Tensor  # [L] bool: queries whose token is about to be decided
    # runs [Hkv, m] of so many neighbours -> their cached keys and values [Hkv, m, size, 2 * D]
    read: Callable[[torch.Tensor, int], torch.Tensor]
    prompt_len: int
    length: int  # prompt and response
    scale: float
    previous: Choice | None = None  # what was chosen last, if the prompt has not been refreshed since


@dataclass
class Asked:
    """B askers, in one layer: a canvas (B = 1) whose queries read together, or generated positions (L = 1)."""

    q: torch.Tensor  # [B, L, H, D]
    summaries: Summaries
    table: torch.Tensor | None  # [B, N] where the summaries of each asker's units lie; None: as they are, B = 1
    counts: torch.Tensor  # [B] units of each asker that may be chosen
    ends: torch.Tensor  # [B] units that the keys it chooses among reach into, an unfinished one included
    prompt: CachedPrompt | None = None  # of a canvas

    def electing(self, query_set: str) -> torch.Tensor:
        """Queries of all rows ("active") or of those to be decided ("masked"), if there are any."""
        if query_set == "active" or self.prompt is None or not bool(self.prompt.voters.any()):
            return self.q
        return self.q[:, self.prompt.voters]


@dataclass(frozen=True)
class Selection:
    name: ClassVar[str | None] = None
    #: field values chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: leaves keys out at all
    sparse: ClassVar[bool] = True
    #: also decodes autoregressive models: a PageSelection (pages.py)
    autoregressive: ClassVar[bool] = False

    def sees_all(self, layer: int) -> bool:
        """Whether everything is read in this layer."""
        return False

    @property
    def unit(self) -> int:
        """Neighbouring tokens that are read or left out together; divides every block size."""
        raise NotImplementedError

    def vectors(self, dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        """Width (at most `dim`) and dtype of a summary's two vectors for keys of such width and dtype. Among the keys
        of a canvas they are kept in the dtype of those."""
        return (dim, dtype), (dim, dtype)

    def summarise(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt's cached keys [N, Hkv, D] -> [R, Hkv, W1], [R, Hkv, W2]"""
        raise NotImplementedError

    def choose(self, asked: Asked) -> Choice:
        """Units to read. Of a canvas those not wholly inside the prompt are none of its business: they are read."""
        raise NotImplementedError

    # -- of a canvas -----------------------------------------------------------------------

    def applies(self, prompt_len: int, length: int) -> bool:
        """Whether anything of such a canvas would be left out."""
        raise NotImplementedError

    def chosen_from(self, prompt_len: int) -> int:
        """Tokens of the prompt that may be left out: the first so many. A multiple of `unit`."""
        return prompt_len // self.unit * self.unit

    def summary_rows(self, prompt_len: int) -> int:
        """How many summaries a prompt has."""
        raise NotImplementedError

    def keeps(self, steps: int) -> bool:
        """Whether a choice that has served so many steps serves another one. (A refresh of the prompt ends it.)"""
        return False
