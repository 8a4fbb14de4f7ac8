"""Other rules for choosing cached keys, to compare the selections with at equal budget."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.selection.base import Asked, CachedPrompt, Choice, Selection
from vllm_dlm.plugins.selection.pages import PageSelection


@dataclass(frozen=True)
class Quest(PageSelection):
    """Pages by the most that any key between their channel-wise minimum and maximum could score."""

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

    def summary_rows(self, prompt_len: int) -> int:
        return 0

    def summarise(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys[:0], keys[:0]

    def choose(self, asked: Asked) -> Choice:
        prompt_len = cached_prompt(asked).prompt_len
        score = self.score(asked)  # [Hkv, prompt]
        best = score.topk(max(1, round(self.share * prompt_len)), -1)[1]
        return Choice(best.sort(-1)[0].to(torch.int32)[None], prompt_len)

    def score(self, asked: Asked) -> torch.Tensor:
        raise NotImplementedError


def cached_prompt(asked: Asked) -> CachedPrompt:
    if asked.prompt is None:
        raise NotImplementedError("these rules choose among the keys of a cached prompt alone")
    return asked.prompt


def keys_of(asked: Asked, length: int) -> torch.Tensor:
    """[Hkv, length, D]"""
    places = torch.arange(length).expand(asked.summaries.first.shape[1], -1)
    return cached_prompt(asked).read(places, 1)[:, :, 0].chunk(2, -1)[0]


def attention_mass(asked: Asked) -> torch.Tensor:
    """What the voters' queries attend to in truth, summed over them and the heads of a key head: [Hkv, length]"""
    q, prompt = asked.electing("masked")[0], cached_prompt(asked)
    keys = keys_of(asked, prompt.length)
    rows = q.unflatten(1, (len(keys), -1)).transpose(0, 1).flatten(1, 2)  # [Hkv, n * G, D]
    return (rows @ keys.transpose(1, 2) * prompt.scale).softmax(-1).sum(1)


class Oracle(Tokens):
    """The tokens that get most attention."""

    name: ClassVar[str] = "oracle"

    def score(self, asked: Asked) -> torch.Tensor:
        return attention_mass(asked)[:, : cached_prompt(asked).prompt_len]


class Random(Tokens):
    name: ClassVar[str] = "random"

    def score(self, asked: Asked) -> torch.Tensor:
        return torch.rand(asked.summaries.first.shape[1], cached_prompt(asked).prompt_len)


class SparseDLLM(Tokens):
    """Sparse-dLLM's rule: products with the mean query, mean over heads, the best of three neighbours, one set for all
    heads."""

    name: ClassVar[str] = "sparse-dllm"

    def score(self, asked: Asked) -> torch.Tensor:
        keys = keys_of(asked, cached_prompt(asked).prompt_len)
        mean = asked.q[0].unflatten(1, (len(keys), -1)).mean((0, 2))  # [Hkv, D]
        score = torch.einsum("hd,hnd->hn", mean, keys).mean(0)
        pooled = torch.nn.functional.max_pool1d(score[None], 3, stride=1, padding=1)
        return pooled.expand(len(keys), -1)
