"""Base class of page selections: a budget, pages that are always read, and one rule for both engines.

A method defines how a page's keys are summarized (`describe`) and how a query
scores a page (`score`). Each key head reads its highest-scored pages, as many
as the budget allows. A page's score is the maximum over the query heads that
share the key head and over all queries that share the choice. The first and the
last pages are always read, and so are pages without a summary. This works on
the cached prompt of diffusion models, whose responses are read completely, and
on all keys that a generated position of an autoregressive model sees.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vllm_dlm.kernels.page_scores import FORCED, LOWEST
from vllm_dlm.kernels.top_pages import store_top_pages, top_pages
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import Choice, ChoiceQuery, PromptUnits, Selection, Summaries


@dataclass(frozen=True)
class PageSelection(Selection):
    autoregressive: ClassVar[bool] = True

    budget_tokens: int = 2048  # tokens read per query and key head, including sink and recent pages
    page_size: int = 64  # a power of two that divides the KV block
    sink_pages: int = 1  # number of first pages that are always read
    recent_pages: int = 2  # number of last pages that are always read
    min_context: int = 8192  # shorter contexts are read completely
    dense_layers: tuple[int, ...] = (0, 1)  # these layers read everything
    query_set: Literal["active", "masked"] = "masked"  # rows that vote: all of the step, or those to be decided
    select_every: int = 1  # denoising steps per choice; a refresh of the prompt ends a choice early

    def __post_init__(self):
        size = self.page_size
        check(16 <= size <= 128 and size & (size - 1) == 0, "page_size", size, "16, 32, 64 or 128")
        check(self.sink_pages >= 0, "sink_pages", self.sink_pages, "at least 0")
        check(self.recent_pages >= 1, "recent_pages", self.recent_pages, "at least 1: the last page may be unfinished")
        check(self.min_context >= 0, "min_context", self.min_context, "at least 0")
        check(self.select_every >= 1, "select_every", self.select_every, "at least 1")
        least = (self.sink_pages + self.recent_pages + 1) * size
        check(
            self.budget_tokens >= least,
            "budget_tokens",
            self.budget_tokens,
            f"at least {least}: the sink and recent pages and one to choose",
        )

    # -- methods implement these -----------------------------------------------------------

    def describe(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of whole pages [n, Hkv, P, D] -> summaries [n, Hkv, W1], [n, Hkv, W2] (see `vectors`)"""
        raise NotImplementedError

    def score(self, q: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """q [B, Hkv, R, D], first [B, Hkv, N, W1], second [B, Hkv, N, W2] -> scores [B, Hkv, R, N]"""
        raise NotImplementedError

    # -- choosing --------------------------------------------------------------------------

    def sees_all(self, layer: int) -> bool:
        return layer in self.dense_layers

    @property
    def unit(self) -> int:
        return self.page_size

    @property
    def kept_pages(self) -> int:
        """Number of pages read per query and key head if any are left out."""
        return self.budget_tokens // self.page_size

    def choose(self, asked: ChoiceQuery) -> Choice:
        scores = self.scores(asked)
        batch, _, count = scores.shape
        if asked.prompts is None:  # the last page is being filled and always read, so it is not chosen
            return Choice(top_pages(scores, min(self.kept_pages - 1, count)), batch * count)
        pages, held = [length // self.page_size for length in asked.prompts.prompt_lens], asked.prompts.held
        most, scored = min(self.kept_pages, max(pages)), sum(pages)
        if held is None:
            return Choice(top_pages(scores, most), scored)
        store_top_pages(held.units, held.rows, scores, most)
        return Choice(None, scored)

    def scores(self, asked: ChoiceQuery) -> torch.Tensor:
        """Scores [B, Hkv, N] float32: FORCED for pages that are always read, -inf beyond a chooser's pages. A method
        with its own kernel overrides this method."""
        first, second = asked.summaries.by_head(asked.table)
        q, votes = asked.electing(self.query_set)  # [B, L, H, D], [B, L]
        rows = q.to(first.dtype).unflatten(2, (first.shape[1], -1)).transpose(1, 2)  # [B, Hkv, L, G, D]
        score = self.score(rows.flatten(2, 3), first, second).float()  # [B, Hkv, L * G, N]
        if votes is not None:
            left_out = votes.logical_not()[..., None].expand(-1, -1, rows.shape[3]).flatten(1)  # [B, L * G]
            score = score.masked_fill(left_out[:, None, :, None], -torch.inf)
        score = score.amax(2)
        score = score.masked_fill(score.isnan(), LOWEST).clamp_(LOWEST, FORCED / 10)
        page = torch.arange(score.shape[2], device=score.device)
        forced = (page < self.sink_pages) | (page >= self.forced_from(asked)[:, None])  # [B, N]
        score = score.masked_fill_(forced[:, None] | second[..., 0].isinf(), FORCED)
        return score.masked_fill_((page >= asked.counts[:, None])[:, None], -torch.inf)

    def forced_from(self, asked: ChoiceQuery) -> torch.Tensor:
        """[B] the first of each chooser's recent pages. For a canvas, these are the last pages of the prompt."""
        if asked.prompts is not None:
            return asked.prompts.numbers[0]
        return self.recent_from(asked.counts) if asked.recent is None else asked.recent

    def recent_from(self, counts: torch.Tensor) -> torch.Tensor:
        """The first recent page of generated positions with `counts` pages before the page that is being filled, which
        counts as recent."""
        return counts - (self.recent_pages - 1)

    # -- the prompt of a diffusion model ---------------------------------------------------

    def applies(self, prompt_len: int, length: int) -> bool:
        return length >= self.min_context and prompt_len // self.page_size > self.kept_pages

    def prompt_units(self, prompt_len: int) -> PromptUnits:
        pages = prompt_len // self.page_size
        first_recent = -(-prompt_len // self.page_size) - self.recent_pages
        return PromptUnits(pages * self.page_size, pages, min(self.kept_pages, pages), (first_recent,))

    def summarise(self, keys: torch.Tensor, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.describe(keys.unflatten(0, (-1, self.page_size)).transpose(1, 2))

    def keeps(self, steps: int) -> bool:
        return steps % self.select_every != 0

    # -- generated positions of an autoregressive model ------------------------------------

    def leaves_out(self, keys: int) -> bool:
        """Whether a position that sees `keys` keys reads only part of them."""
        return keys >= self.min_context and -(-keys // self.page_size) > self.kept_pages

    def store(self, cache: torch.Tensor, page_ids: torch.Tensor, summaries: Summaries) -> None:
        """Summarizes pages of a cache [blocks, Hkv, block_size, 2 * D] from their current keys. For ids below 0, the
        padding, page 0 is summarized, which vLLM never allocates."""
        pages = cache.unflatten(2, (-1, self.page_size))  # [blocks, Hkv, pages per block, P, 2 * D]
        ids, per_block = page_ids.long().clamp_min(0), pages.shape[2]
        keys = pages[ids // per_block, :, ids % per_block, :, : pages.shape[4] // 2]
        self.put(keys, ids, summaries)

    def put(self, keys: torch.Tensor, page_ids: torch.Tensor, summaries: Summaries) -> None:
        """Like `store`, for pages whose keys [n, Hkv, P, D] the caller has gathered."""
        first, second = self.describe(keys)
        summaries.first[page_ids] = first.to(summaries.first.dtype)
        summaries.second[page_ids] = second.to(summaries.second.dtype)
