"""Base class of selections of cached keys, for canvases of diffusion models and generated positions of autoregressive
models.

A selection divides cached keys into units (pages, pairs, tokens). It summarizes
each unit once (`summarise`: two vectors per unit and key head) and later
chooses the units that the queries of a step read (`choose`). The engine stores
the summaries: for a canvas in KV blocks of its request, one summary per key and
value slot; in page-sparse decoding next to vLLM's KV cache, by physical page.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from vllm_dlm.kernels.packed_attention import PackedCache, read_key_runs
from vllm_dlm.kernels.page_scores import ScoringQueries


@dataclass
class Summaries:
    """Summaries of one layer, n per place. `second` is INVALID (see kernels/haar_pyramid) for units without one."""

    first: torch.Tensor  # [places, Hkv, n, W1]; n = 1: [places, Hkv, W1]
    second: torch.Tensor  # the same with W2

    def by_place(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[places, Hkv, n, W1], [places, Hkv, n, W2]"""
        first, second = self.first, self.second
        return (first, second) if first.dim() == 4 else (first[:, :, None], second[:, :, None])

    def by_head(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers the places in table [B, N] -> [B, Hkv, N * n, W1], [B, Hkv, N * n, W2]"""
        first, second = self.by_place()
        # gather head by head, because products with non-contiguous rows are many times slower
        kv_heads = first.shape[1]
        row = (table[:, None] * kv_heads + torch.arange(kv_heads, device=table.device)[:, None]).flatten()
        shape = (len(table), kv_heads, -1)
        return tuple(part.flatten(0, 1).index_select(0, row).view(*shape, part.shape[3]) for part in (first, second))


@dataclass
class StoredChoices:
    """Storage of one layer for choices that canvases use for more than one step: int32, rows padded with -1."""

    units: torch.Tensor  # [slots, Hkv, units]
    memo: torch.Tensor  # [slots, Hkv, M] state that a selection keeps for its next choice
    rows: torch.Tensor  # [B] int64 slot of each canvas
    known: torch.Tensor  # [B] bool: the stored choice was made from the same keys

    def put(self, units: torch.Tensor) -> None:
        """Stores choices [B, Hkv, K] that the selection has returned instead of storing them itself"""
        missing = self.units.shape[2] - units.shape[2]
        self.units.index_copy_(0, self.rows, F.pad(units, (0, missing), value=-1))


@dataclass
class Choice:
    units: torch.Tensor | None  # [B, Hkv, K] int32, ascending, padded with -1; None: stored in `StoredChoices`
    scored: int  # upper bound on the summaries and keys that were compared with the queries


class CachedKeys(NamedTuple):
    """The keys that units were summarized from."""

    cache: torch.Tensor | PackedCache  # [blocks, Hkv, block_size, 2 * D], keys before values
    table: torch.Tensor  # [B, N] blocks of each chooser


@dataclass
class CachedPrompts:
    """Data about canvases beyond their summaries."""

    cache: torch.Tensor | PackedCache  # [blocks, Hkv, block_size, 2 * D], keys before values
    table: torch.Tensor  # [B, N] blocks of each canvas
    prompt_lens: list[int]
    lengths: list[int]  # prompt and response
    numbers: torch.Tensor  # [M, B] int32: `PromptUnits.numbers` of each prompt
    scale: float
    voters: torch.Tensor  # [Tq] bool: queries whose token is to be decided
    held: StoredChoices | None = None  # for choices of several steps; `choose` may store there instead of returning

    def keys(self, runs: torch.Tensor, size: int) -> torch.Tensor:
        """Keys [B, Hkv, n, size, D] of runs [B, Hkv, n] of `size` positions, which do not cross blocks. Keys of run -1
        are undefined."""
        _, kv_heads, block_size, _ = self.cache.shape
        per_block, runs = block_size // size, runs.clamp_min(0).long()
        block = self.table[:, None].expand(-1, kv_heads, -1).gather(2, (runs // per_block).flatten(2)).view(runs.shape)
        head = torch.arange(kv_heads, device=runs.device)[:, None]
        row = (block * kv_heads + head) * per_block + runs % per_block
        return read_key_runs(self.cache, row.flatten(), size).unflatten(0, runs.shape)


@dataclass
class ChoiceQuery:
    """Input of `choose` in one layer for B choosers: canvases, whose queries share one choice, or generated positions,
    with one query each."""

    q: torch.Tensor  # [Tq, H, D]
    starts: torch.Tensor  # [B] queries of each chooser are q[start:end]
    ends: torch.Tensor  # [B]
    most: int  # upper bound on queries per chooser
    summaries: Summaries
    table: torch.Tensor  # [B, N] places of the summaries of each chooser's units, n per place
    counts: torch.Tensor  # [B] units that each chooser may choose from; for generated positions, all but the last one
    prompts: CachedPrompts | None = None  # canvases only
    recent: torch.Tensor | None = None  # [B] generated positions only: the first unit that must be read as recent
    keys: CachedKeys | None = None  # generated positions only

    @property
    def cached(self) -> CachedKeys:
        if self.prompts is not None:
            return CachedKeys(self.prompts.cache, self.prompts.table)
        assert self.keys is not None
        return self.keys

    def voters(self, query_set: str) -> torch.Tensor | None:
        """[Tq] rows to be decided ("masked"), or None for all rows ("active"). Without voters, all rows of a chooser
        vote."""
        return None if query_set == "active" or self.prompts is None else self.prompts.voters

    def scoring(self, query_set: str, lam: float, reduce: str, sharpness: float = 1.0) -> ScoringQueries:
        return ScoringQueries(self.q, self.starts, self.ends, lam, reduce, self.voters(query_set), sharpness)

    def electing(self, query_set: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries of each chooser, padded [B, L, H, D], and which of them vote [B, L] (None: all)."""
        if self.most == 1 and len(self.q) == len(self.starts):
            return self.q[:, None], None
        row = self.starts[:, None] + torch.arange(self.most, device=self.q.device)
        votes = row < self.ends[:, None]
        row = row.clamp_max(len(self.q) - 1)
        if (voters := self.voters(query_set)) is not None:
            named = votes & voters[row]
            votes = torch.where(named.any(1, keepdim=True), named, votes)
        return self.q[row], votes


class PromptUnits(NamedTuple):
    """The units of a canvas's prompt from which a selection chooses."""

    candidates: int  # first tokens of the prompt that may be left out, a multiple of `Selection.unit`
    summaries: int  # number of summaries
    kept: int  # number of units that are chosen
    numbers: tuple[int, ...] = ()  # integers that `choose` needs on the device (CachedPrompts.numbers)
    memo: int = 0  # integers per head that a choice keeps for the next one (StoredChoices.memo)


@dataclass(frozen=True)
class Selection:
    name: ClassVar[str | None] = None
    #: field values chosen as "name/preset"
    presets: ClassVar[dict[str, dict]] = {}
    #: some keys may be left out
    sparse: ClassVar[bool] = True
    #: works for autoregressive models, too; requires a PageSelection (pages.py)
    autoregressive: ClassVar[bool] = False

    def sees_all(self, layer: int) -> bool:
        """Whether this layer reads everything."""
        return False

    @property
    def unit(self) -> int:
        """Number of consecutive tokens that are read or left out together; divides every block size."""
        raise NotImplementedError

    def vectors(self, dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        """Width (at most `dim`) and dtype of a summary's two vectors, for keys of width `dim` and this dtype. The
        diffusion engine stores them in its KV cache, in the keys' dtype."""
        return (dim, dtype), (dim, dtype)

    def summarise(self, keys: torch.Tensor, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Summarizes the keys of prompts: concatenated keys [N, Hkv, D], the first `lens[i]` tokens of prompt i (see
        `PromptUnits.candidates`) -> [R, Hkv, W1], [R, Hkv, W2]"""
        raise NotImplementedError

    def choose(self, asked: ChoiceQuery) -> Choice:
        """Units to read. For a canvas, units not fully inside the prompt are always read and not chosen here."""
        raise NotImplementedError

    # -- for canvases ----------------------------------------------------------------------

    def applies(self, prompt_len: int, length: int) -> bool:
        """Whether anything of a canvas with these lengths would be left out."""
        raise NotImplementedError

    def prompt_units(self, prompt_len: int) -> PromptUnits:
        """Units and number of chosen units for a prompt of this length."""
        raise NotImplementedError

    def keeps(self, steps: int) -> bool:
        """Whether a choice that has served `steps` steps is used again. A refresh of the prompt ends it anyway."""
        return False
