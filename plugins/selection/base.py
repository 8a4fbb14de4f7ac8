"""What every selection of cached keys shares, whoever asks: a canvas of a diffusion model, or generated positions of
an autoregressive one.

A selection cuts cached keys into units (pages, pairs, tokens), describes them
once (`summarise`: two vectors per unit and key head) and later picks, for the
queries of a step, the units that are read (`choose`). Where the summaries are
kept is the engine's business: a canvas has them in blocks of its request, in
the slots of as many keys and values; the page-sparse engine beside vLLM's KV
cache, by physical page.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F


@dataclass
class Summaries:
    """One layer's, n to a place; the second is INVALID (see kernels/haar_pyramid) where nobody has described."""

    first: torch.Tensor  # [places, Hkv, n, W1]; n = 1: [places, Hkv, W1]
    second: torch.Tensor  # the same of W2

    def by_place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[places, Hkv, n, W1], [places, Hkv, n, W2]"""
        first, second = self.first, self.second
        return (first, second) if first.dim() == 4 else (first[:, :, None], second[:, :, None])

    def by_head(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the places table [B, N] -> [B, Hkv, N * n, W1], [B, Hkv, N * n, W2]"""
        first, second = self.by_place()
        # gathered head by head: products with rows that do not lie side by side are many times slower
        kv_heads = first.shape[1]
        row = (table[:, None] * kv_heads + torch.arange(kv_heads, device=table.device)[:, None]).flatten()
        shape = (len(table), kv_heads, -1)
        return tuple(part.flatten(0, 1).index_select(0, row).view(*shape, part.shape[3]) for part in (first, second))


@dataclass
class Held:
    """Where choices of canvases that serve longer than a step stay, in one layer: int32, -1 at the end of a row."""

    units: torch.Tensor  # [slots, Hkv, units]
    memo: torch.Tensor  # [slots, Hkv, M] what a selection keeps for its next choice
    rows: torch.Tensor  # [B] int64 slot of each canvas
    known: torch.Tensor  # [B] bool: what stands there was chosen from the same keys

    def put(self, units: torch.Tensor) -> None:
        """Choices [B, Hkv, K] that a selection has not written here itself"""
        missing = self.units.shape[2] - units.shape[2]
        self.units.index_copy_(0, self.rows, F.pad(units, (0, missing), value=-1))


@dataclass
class Choice:
    units: torch.Tensor | None  # [B, Hkv, K] int32, ascending, -1 at the end where an asker has fewer; None: see `Held`
    scored: int  # summaries and keys that were compared with the queries, at most


@dataclass
class CachedPrompts:
    """What is known of canvases beyond their summaries."""

    cache: torch.Tensor  # [blocks, Hkv, block_size, 2 * D], keys before values
    table: torch.Tensor  # [B, N] blocks of each canvas
    prompt_lens: list[int]
    lengths: list[int]  # prompt and response
    numbers: torch.Tensor  # [M, B] int32: `Selection.numbers` of each
    scale: float
    voters: torch.Tensor  # [Tq] bool: queries whose token is about to be decided
    held: Held | None = None  # choices of several steps: those written there need not be returned

    def keys(self, runs: torch.Tensor, size: int) -> torch.Tensor:
        """Runs [B, Hkv, n] of so many neighbours, which lie within blocks -> [B, Hkv, n, size, D]. A run of -1 is
        anything."""
        _, kv_heads, block_size, width = self.cache.shape
        per_block, runs = block_size // size, runs.clamp_min(0).long()
        block = self.table[:, None].expand(-1, kv_heads, -1).gather(2, (runs // per_block).flatten(2)).view(runs.shape)
        head = torch.arange(kv_heads, device=runs.device)[:, None]
        row = (block * kv_heads + head) * per_block + runs % per_block
        found = self.cache.view(-1, size * width).index_select(0, row.flatten())
        return found.view(*runs.shape, size, width)[..., : width // 2]


@dataclass
class Asked:
    """B askers, in one layer: canvases whose queries read together, or generated positions, of a query each."""

    q: torch.Tensor  # [Tq, H, D]
    starts: torch.Tensor  # [B] each asker's queries are q[start:end]
    ends: torch.Tensor  # [B]
    most: int  # queries that an asker has at most
    summaries: Summaries
    table: torch.Tensor  # [B, N] where the summaries of each asker's units lie, n to a place
    counts: torch.Tensor  # [B] units of each asker that may be chosen; of generated positions, all but the last one
    prompts: CachedPrompts | None = None  # of canvases
    recent: torch.Tensor | None = None  # [B] of generated positions: the first unit that is too recent to be left out

    def voters(self, query_set: str) -> torch.Tensor | None:
        """[Tq] those to be decided ("masked"), or None for all rows ("active"). An asker with no voters has all."""
        return None if query_set == "active" or self.prompts is None else self.prompts.voters

    def electing(self, query_set: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each asker's queries side by side [B, L, H, D], and which of them vote [B, L] (None: all)."""
        if self.most == 1 and len(self.q) == len(self.starts):
            return self.q[:, None], None
        row = self.starts[:, None] + torch.arange(self.most, device=self.q.device)
        votes = row < self.ends[:, None]
        row = row.clamp_max(len(self.q) - 1)
        if (voters := self.voters(query_set)) is not None:
            named = votes & voters[row]
            votes = torch.where(named.any(1, keepdim=True), named, votes)
        return self.q[row], votes


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

    def summarise(self, keys: torch.Tensor, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cached keys of prompts one after the other, so many of each (`chosen_from`), [N, Hkv, D]
        -> [R, Hkv, W1], [R, Hkv, W2]"""
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

    def units_kept(self, prompt_len: int) -> int:
        """How many units of a prompt are chosen."""
        raise NotImplementedError

    def numbers(self, prompt_len: int) -> list[int]:
        """What `choose` has to know of each prompt on the device (CachedPrompts.numbers)."""
        return []

    def memo(self, prompt_len: int) -> int:
        """How many numbers each head's choice keeps for the next one (`Held.memo`)."""
        return 0

    def keeps(self, steps: int) -> bool:
        """Whether a choice that has served so many steps serves another one. (A refresh of the prompt ends it.)"""
        return False
