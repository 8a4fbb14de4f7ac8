"""Other rules for choosing cached keys, to compare the selections with at equal budget."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_dlm.plugins.selection.base import Asked, Choice, Selection
from vllm_dlm.plugins.selection.unique import Unique


@dataclass(frozen=True)
class Quest(Unique):
    """Pages by the most that any key between their channel-wise minimum and maximum could score."""

    name: ClassVar[str] = "quest"
    std_kind: str = "vector"
    lam: float = 1.0

    def summarise(self, keys: torch.Tensor) -> torch.Tensor:
        pages = keys[: len(keys) // self.page_size * self.page_size].unflatten(0, (-1, self.page_size))
        top, bottom = pages.amax(1), pages.amin(1)
        # max(q * top, q * bottom) = q * their middle + |q| * half their distance
        return torch.cat([(top + bottom) / 2, (top - bottom) / 2], -1)


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

    def summarise(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.new_zeros(0, keys.shape[1], 2 * keys.shape[2])

    def choose(self, asked: Asked) -> Choice:
        count = max(1, round(self.share * asked.prompt_len))
        score = self.score(asked)  # [Hkv, prompt]
        return Choice(score.topk(count, -1)[1].sort(-1)[0].to(torch.int32), asked.prompt_len)

    def score(self, asked: Asked) -> torch.Tensor:
        raise NotImplementedError


def keys_of(asked: Asked, length: int) -> torch.Tensor:
    """[Hkv, length, D]"""
    return asked.read(torch.arange(length).expand(len(asked.summary), -1), 1)[:, :, 0].chunk(2, -1)[0]


def attention_mass(asked: Asked) -> torch.Tensor:
    """What the voters' queries attend to in truth, summed over them and the heads of a key head: [Hkv, length]"""
    q = asked.electing("masked")
    keys = keys_of(asked, asked.length)
    rows = q.unflatten(1, (len(keys), -1)).transpose(0, 1).flatten(1, 2)  # [Hkv, n * G, D]
    return (rows @ keys.transpose(1, 2) * asked.scale).softmax(-1).sum(1)


class Oracle(Tokens):
    """The tokens that get most attention."""

    name: ClassVar[str] = "oracle"

    def score(self, asked: Asked) -> torch.Tensor:
        return attention_mass(asked)[:, : asked.prompt_len]


class Random(Tokens):
    name: ClassVar[str] = "random"

    def score(self, asked: Asked) -> torch.Tensor:
        return torch.rand(len(asked.summary), asked.prompt_len)


class SparseDLLM(Tokens):
    """Sparse-dLLM's rule: products with the mean query, mean over heads, the best of three neighbours, one set for all
    heads."""

    name: ClassVar[str] = "sparse-dllm"

    def score(self, asked: Asked) -> torch.Tensor:
        keys = keys_of(asked, asked.prompt_len)
        mean = asked.q.unflatten(1, (len(keys), -1)).mean((0, 2))  # [Hkv, D]
        score = torch.einsum("hd,hnd->hn", mean, keys).mean(0)
        pooled = torch.nn.functional.max_pool1d(score[None], 3, stride=1, padding=1)
        return pooled.expand(len(keys), -1)
