"""What selections of pages share: a budget, pages that are always read, and one rule for both engines.

A method says what is kept of a page's keys (`describe`) and what a page
promises to a query (`score`). The best pages of each key head are read, as
many as the budget allows: the heads that share it, and all queries that read
together, count by the one that is promised most. The first pages and the last
ones are always read, and so are pages nobody has described. Works on the
cached prompt of diffusion models, whose responses are read whole, and on
everything a generated position of an autoregressive model sees.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vllm_dlm.kernels.page_scores import FORCED, LOWEST
from vllm_dlm.kernels.top_pages import store_top_pages, top_pages
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import Asked, Choice, Selection, Summaries


@dataclass(frozen=True)
class PageSelection(Selection):
    autoregressive: ClassVar[bool] = True

    budget_tokens: int = 2048  # read per query and key head, sink and recent pages included
    page_size: int = 64  # a power of two that divides the KV block
    sink_pages: int = 1  # the first ones are always read
    recent_pages: int = 2  # and the last ones
    min_context: int = 8192  # shorter ones are read whole
    dense_layers: tuple[int, ...] = (0, 1)  # these layers read everything
    query_set: Literal["active", "masked"] = "masked"  # who chooses for a step: all its rows, or those to be decided
    select_every: int = 1  # denoising steps that a choice serves; a refresh of the prompt ends it before

    def __post_init__(self):
        size = self.page_size
        check(16 <= size <= 128 and size & (size - 1) == 0, "page_size", size, "16, 32, 64 or 128")
        check(self.sink_pages >= 0, "sink_pages", self.sink_pages, "at least 0")
        check(self.recent_pages >= 1, "recent_pages", self.recent_pages, "at least 1: the last page may be unfinished")
        check(self.min_context >= 0, "min_context", self.min_context, "at least 0")
        check(self.select_every >= 1, "select_every", self.select_every, "at least 1")
        least = (self.sink_pages + self.recent_pages + 1) * size
        check(
            self.budget_tokens >= least, "budget_tokens", self.budget_tokens,
            f"at least {least}: the sink and recent pages and one to choose",
        )  # fmt: skip

    # -- what a method says ----------------------------------------------------------------

    def describe(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of whole pages [n, Hkv, P, D] -> what is kept of them, [n, Hkv, W1], [n, Hkv, W2] (see `vectors`)"""
        raise NotImplementedError

    def score(self, q: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """q [B, Hkv, R, D], first [B, Hkv, N, W1], second [B, Hkv, N, W2] -> promises [B, Hkv, R, N]"""
        raise NotImplementedError

    # -- choosing --------------------------------------------------------------------------

    def sees_all(self, layer: int) -> bool:
        return layer in self.dense_layers

    @property
    def unit(self) -> int:
        return self.page_size

    @property
    def kept_pages(self) -> int:
        """Pages that are read per query and key head where any are left out."""
        return self.budget_tokens // self.page_size

    def choose(self, asked: Asked) -> Choice:
        scores = self.scores(asked)
        batch, _, count = scores.shape
        if asked.prompts is None:  # the last page, which is being filled, is read without being asked for
            return Choice(top_pages(scores, min(self.kept_pages - 1, count)), batch * count)
        most = max(map(self.units_kept, asked.prompts.prompt_lens))
        scored, held = sum(map(self.summary_rows, asked.prompts.prompt_lens)), asked.prompts.held
        if held is None:
            return Choice(top_pages(scores, most), scored)
        store_top_pages(held.units, held.rows, scores, most)
        return Choice(None, scored)

    def scores(self, asked: Asked) -> torch.Tensor:
        """[B, Hkv, N] float32: FORCED where a page is always read, -inf beyond an asker's pages. A method with a
        kernel of its own replaces it as a whole."""
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

    def forced_from(self, asked: Asked) -> torch.Tensor:
        """[B] the first of each asker's last pages. Of a canvas, the prompt's end counts as recent."""
        if asked.prompts is not None:
            return asked.prompts.numbers[0]
        return self.recent_from(asked.counts) if asked.recent is None else asked.recent

    def recent_from(self, counts: torch.Tensor) -> torch.Tensor:
        """Of generated positions with so many pages before the one that is being filled, which is the most recent."""
        return counts - (self.recent_pages - 1)

    # -- the prompt of a diffusion model ---------------------------------------------------

    def applies(self, prompt_len: int, length: int) -> bool:
        return length >= self.min_context and prompt_len // self.page_size > self.kept_pages

    def summary_rows(self, prompt_len: int) -> int:
        return prompt_len // self.page_size

    def units_kept(self, prompt_len: int) -> int:
        return min(self.kept_pages, self.summary_rows(prompt_len))

    def numbers(self, prompt_len: int) -> list[int]:
        return [-(-prompt_len // self.page_size) - self.recent_pages]

    def summarise(self, keys: torch.Tensor, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.describe(keys.unflatten(0, (-1, self.page_size)).transpose(1, 2))

    def keeps(self, steps: int) -> bool:
        return steps % self.select_every != 0

    # -- generated positions of an autoregressive model ------------------------------------

    def leaves_out(self, keys: int) -> bool:
        """Whether a position that sees so many keys reads only part of them."""
        return keys >= self.min_context and -(-keys // self.page_size) > self.kept_pages

    def store(self, cache: torch.Tensor, page_ids: torch.Tensor, summaries: Summaries) -> None:
        """Describes pages of a plain cache [blocks, Hkv, block_size, 2 * D] from the keys that lie there now. An id
        below 0 names no page; page 0, which vLLM gives to nobody, is described in its place."""
        pages = cache.unflatten(2, (-1, self.page_size))  # [blocks, Hkv, pages of a block, P, 2 * D]
        ids, per_block = page_ids.long().clamp_min(0), pages.shape[2]
        keys = pages[ids // per_block, :, ids % per_block, :, : pages.shape[4] // 2]
        self.put(keys, ids, summaries)

    def put(self, keys: torch.Tensor, page_ids: torch.Tensor, summaries: Summaries) -> None:
        """The same of pages whose keys [n, Hkv, P, D] the caller has read himself."""
        first, second = self.describe(keys)
        summaries.first[page_ids] = first.to(summaries.first.dtype)
        summaries.second[page_ids] = second.to(summaries.second.dtype)
