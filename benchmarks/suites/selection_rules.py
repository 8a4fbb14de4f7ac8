"""Other rules for choosing cached keys, which selections are compared with at equal budget."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vllm_dlm.plugins.selection.base import CachedPrompts, Choice, ChoiceQuery, PromptUnits, Selection
from vllm_dlm.plugins.selection.pages import PageSelection


@dataclass(frozen=True)
class Quest(PageSelection):
    """Pages by an upper bound on the score of their keys, from the channel-wise minimum and maximum"""

    name: ClassVar[str] = "quest"

    def describe(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys.amin(2), keys.amax(2)

    def score(self, q: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return q.clamp_max(0) @ first.mT + q.clamp_min(0) @ second.mT


@dataclass(frozen=True)
class Tokens(Selection):
    """Single tokens, scored from all cached keys."""

    share: float = 0.16

    @property
    def unit(self) -> int:
        return 1

    def applies(self, prompt_len: int, length: int) -> bool:
        return True

    def prompt_units(self, prompt_len: int) -> PromptUnits:
        return PromptUnits(prompt_len, 0, max(1, round(self.share * prompt_len)))

    def summarise(self, keys: torch.Tensor, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return keys[:0], keys[:0]

    def choose(self, asked: ChoiceQuery) -> Choice:
        lens = cached_prompts(asked).prompt_lens
        chosen = []
        for own, prompt_len in zip(canvases(asked), lens, strict=True):
            best = (
                self.score(own).topk(self.prompt_units(prompt_len).kept, -1)[1].sort(-1)[0].to(torch.int32)
            )  # [Hkv, K]
            most = max(self.prompt_units(length).kept for length in lens)
            chosen.append(torch.nn.functional.pad(best, (0, most - best.shape[1]), value=-1))
        return Choice(torch.stack(chosen), sum(lens))

    def score(self, asked: ChoiceQuery) -> torch.Tensor:
        """Scores of the prompt tokens of one canvas, [Hkv, prompt]"""
        raise NotImplementedError


def cached_prompts(asked: ChoiceQuery) -> CachedPrompts:
    if asked.prompts is None:
        raise NotImplementedError("these rules choose only among the keys of a cached prompt")
    return asked.prompts


def canvases(asked: ChoiceQuery) -> list[ChoiceQuery]:
    """One question per canvas"""
    parts = []
    for i, (start, end) in enumerate(zip(asked.starts.tolist(), asked.ends.tolist(), strict=True)):
        prompts = cached_prompts(asked)
        own = replace(
            prompts,
            table=prompts.table[i : i + 1],
            prompt_lens=[prompts.prompt_lens[i]],
            lengths=[prompts.lengths[i]],
            numbers=prompts.numbers[:, i : i + 1],
            voters=prompts.voters[start:end],
        )
        rows = asked.starts[:1] * 0, asked.ends[i : i + 1] - start, end - start
        place = asked.table[i : i + 1], asked.counts[i : i + 1]
        parts.append(ChoiceQuery(asked.q[start:end], *rows, asked.summaries, *place, own))
    return parts


def keys_of(asked: ChoiceQuery, length: int) -> torch.Tensor:
    """[Hkv, length, D]"""
    prompts = cached_prompts(asked)
    return prompts.keys(torch.arange(length).expand(1, prompts.cache.shape[1], -1), 1)[0, :, :, 0]


def attention_mass(asked: ChoiceQuery) -> torch.Tensor:
    """Attention weight of a canvas's voters, summed over them and the heads of a key head: [Hkv, length]"""
    prompts = cached_prompts(asked)
    q, keys = asked.q, keys_of(asked, prompts.lengths[0])
    if prompts.voters.any():
        q = q[prompts.voters]
    rows = q.unflatten(1, (len(keys), -1)).transpose(0, 1).flatten(1, 2)  # [Hkv, n * G, D]
    return (rows @ keys.transpose(1, 2) * prompts.scale).softmax(-1).sum(1)


class Oracle(Tokens):
    """The tokens that get most attention, which takes reading all of them"""

    name: ClassVar[str] = "oracle"

    def score(self, asked: ChoiceQuery) -> torch.Tensor:
        return attention_mass(asked)[:, : cached_prompts(asked).prompt_lens[0]]


class Random(Tokens):
    name: ClassVar[str] = "random"

    def score(self, asked: ChoiceQuery) -> torch.Tensor:
        return torch.rand(asked.summaries.first.shape[1], cached_prompts(asked).prompt_lens[0])


class SparseDLLM(Tokens):
    """Sparse-dLLM's rule: products with the mean query, mean over heads, the best of three neighbours, one set for all
    heads."""

    name: ClassVar[str] = "sparse-dllm"

    def score(self, asked: ChoiceQuery) -> torch.Tensor:
        keys = keys_of(asked, cached_prompts(asked).prompt_lens[0])
        mean = asked.q.unflatten(1, (len(keys), -1)).mean((0, 2))  # [Hkv, D]
        score = torch.einsum("hd,hnd->hn", mean, keys).mean(0)
        pooled = torch.nn.functional.max_pool1d(score[None], 3, stride=1, padding=1)
        return pooled.expand(len(keys), -1)
