"""What the last positions of a text read under a selection, by the selection's own `choose`, and rules to compare with.

`decoding`: each position chooses alone, as a generated position of an autoregressive model. `together`: the last
positions share one choice among the keys before them, as the queries of a canvas.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from benchmarks.lib.llama import Llama, Visible, causal
from vllm_dlm.kernels.page_scores import FORCED
from vllm_dlm.plugins.selection.base import CachedKeys, CachedPrompts, ChoiceQuery, Selection, Summaries
from vllm_dlm.plugins.selection.pages import PageSelection

BLOCK = 128  # tokens


@dataclass(frozen=True)
class Quest(PageSelection):
    """The largest product that a key between the least and the largest entries of a page could have"""

    name: ClassVar[str] = "quest"

    def describe(self, keys):
        return keys.amin(2), keys.amax(2)

    def score(self, q, first, second):
        return q.clamp_max(0) @ first.mT + q.clamp_min(0) @ second.mT


@dataclass(frozen=True)
class Recency(PageSelection):
    """The last pages"""

    name: ClassVar[str] = "recent only"

    def describe(self, keys):
        return keys[:, :, 0, :1] * 0, keys[:, :, 0, :1] * 0

    def score(self, q, first, second):
        return torch.arange(first.shape[2]).float().expand(*q.shape[:3], -1)


@dataclass(frozen=True)
class Exact(PageSelection):
    """The pages with the largest shares of attention, summed over the queries and heads that choose together"""

    name: ClassVar[str] = "exact best pages"

    def describe(self, keys):
        return keys.flatten(2), keys[:, :, 0, :1] * 0

    def scores(self, asked):
        """For choosers that share one table, so that the keys are not copied for each"""
        keys = asked.summaries.first.unflatten(2, (self.page_size, -1)).transpose(0, 1)  # [Hkv, N, P, D]
        q, _ = asked.electing("active")  # [B, L, H, D]
        rows = q.unflatten(2, (len(keys), -1)).permute(2, 0, 1, 3, 4)  # [Hkv, B, L, G, D]
        logits = rows.flatten(1, 3) @ keys.flatten(1, 2).mT * keys.shape[3] ** -0.5
        mass = logits.unflatten(2, (-1, self.page_size)).logsumexp(3)  # [Hkv, B * L * G, N]
        mass = mass.unflatten(1, (len(q), -1)).transpose(0, 1)  # [B, Hkv, L * G, N]
        page = torch.arange(mass.shape[3])
        beyond = (page >= asked.counts[:, None])[:, None]
        forced = ((page < self.sink_pages) | (page >= self.forced_from(asked)[:, None]))[:, None]
        share = mass.masked_fill((forced | beyond)[:, :, None], -torch.inf).softmax(3).sum(2)
        return share.masked_fill(forced, FORCED).masked_fill(beyond, -torch.inf)


def decoding(rule: PageSelection, prompt_len: int) -> Visible:
    """The visible keys of each position after `prompt_len` tokens"""

    def visible(layer: int, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        if rule.sees_all(layer):
            return None
        (rows, length), size = (len(q), keys.shape[1]), rule.page_size
        pages = keys[:, : length // size * size].unflatten(1, (-1, size)).transpose(0, 1)  # [N, Hkv, P, D]
        last = torch.arange(length - rows, length) // size  # [R] the page of each position
        table = torch.arange(len(pages)).expand(rows, -1)
        one = torch.arange(rows + 1)
        cache = blocks_of(keys)
        own = CachedKeys(cache, torch.arange(len(cache)).expand(rows, -1))
        asked = ChoiceQuery(q, one[:-1], one[1:], 1, Summaries(*rule.describe(pages)), table, last, keys=own)
        units = rule.choose(asked).units
        return named(units, size, length, last) & causal(rows, length)

    return visible


def named(units: torch.Tensor, size: int, length: int, last: torch.Tensor | None = None) -> torch.Tensor:
    """Units [B, Hkv, K] of `size` tokens, padded with -1, and the unit `last` [B] -> their tokens [Hkv, B, length]"""
    count = -(-length // size)
    marks = torch.zeros(*units.shape[:2], count + 1, dtype=torch.bool)
    marks.scatter_(2, units.long() % (count + 1), True)  # -1 becomes the one beyond the end
    if last is not None:
        marks.scatter_(2, last[:, None, None].expand(-1, units.shape[1], 1), True)
    return marks[..., :count].repeat_interleave(size, 2)[..., :length].transpose(0, 1)


def together(rule: Selection, prompt_len: int) -> Visible:
    """The visible keys of positions that share one choice among the keys of a prompt"""

    def visible(layer: int, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        rows, length = len(q), keys.shape[1]
        if rule.sees_all(layer):
            return None
        of_prompt = rule.prompt_units(prompt_len)
        own = keys[:, : of_prompt.candidates].transpose(0, 1)  # [n, Hkv, D]
        summaries = Summaries(*rule.summarise(own, [of_prompt.candidates]))
        asked = ChoiceQuery(
            q,
            torch.tensor([0]),
            torch.tensor([rows]),
            rows,
            summaries,
            torch.arange(of_prompt.summaries)[None],
            torch.tensor([of_prompt.summaries]),
            cached(keys, prompt_len, of_prompt.numbers, rows),
        )
        chosen = named(rule.choose(asked).units, rule.unit, length).expand(-1, rows, -1)
        always = torch.arange(length) >= prompt_len // rule.unit * rule.unit
        return (chosen | always) & causal(rows, length)

    return visible


def cached(keys: torch.Tensor, prompt_len: int, numbers: tuple[int, ...], rows: int) -> CachedPrompts:
    cache = blocks_of(keys)
    return CachedPrompts(
        cache,
        torch.arange(len(cache))[None],
        [prompt_len],
        [keys.shape[1]],
        torch.tensor(numbers, dtype=torch.int32)[:, None],
        keys.shape[2] ** -0.5,
        torch.ones(rows, dtype=torch.bool),
    )


def blocks_of(keys: torch.Tensor) -> torch.Tensor:
    """Keys [Hkv, T, D] as a cache [blocks, Hkv, BLOCK, 2 * D], without values"""
    padded = F.pad(keys, (0, keys.shape[2], 0, -keys.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()


def bytes_read(rule: PageSelection, length: int, model: Llama) -> float:
    """Bytes of keys, values and summaries that one position reads, over those of a dense one, in bfloat16"""
    (first, first_type), (second, second_type) = rule.vectors(model.dim, torch.bfloat16)
    summary = first * first_type.itemsize + second * second_type.itemsize
    twice = getattr(rule, "candidates", 0) * rule.budget_tokens  # keys that are looked at before they are read
    read = 2 * model.dim * (2 * rule.budget_tokens + min(twice, length)) + summary * (length // rule.page_size)
    share = min(1.0, read / (4 * model.dim * length))
    dense = sum(rule.sees_all(layer) for layer in range(model.layers))
    return (dense + share * (model.layers - dense)) / model.layers
