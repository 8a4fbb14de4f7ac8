"""WaveFilter: skim the prompt's keys at coarse wavelet resolution, keep what promises most, look closer, attend there.

https://arxiv.org/abs/2606.00724. At scale b the low-pass band of the keys
stands for runs of 2^b tokens. The queries of a step vote (softmax over the
runs, summed over queries and the heads of a key head), a proportion m_b of the
runs stays, and the next finer scale goes on inside them, from `levels` down to
pairs of tokens. With Haar the band is the run's mean, so nothing has to be
transformed twice: the coarsest scale is kept beside the cache and made anew
when the prompt is refreshed, finer ones are means of the keys that are left.

Beyond the paper, off in preset "paper": a bound for what a mean hides, from
the energy of the detail bands (`detail_lambda`); a last scale of single tokens
(`token_stage`); choices that serve longer than a step (`reselect`); first and
last tokens that always stay. A choice held for a whole block goes stale with
the tokens that are filled, so "serve" looks at the coarsest scale in every
step and descends anew where that has moved.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pywt
import torch

from vllm_dlm.kernels.haar_pyramid import mean_and_variance
from vllm_dlm.kernels.page_scores import Reduction, run_scores
from vllm_dlm.kernels.top_pages import top_pages
from vllm_dlm.kernels.wavelet_lowpass import lowpass
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import Asked, Choice, Selection


@dataclass(frozen=True)
class WaveFilter(Selection):
    name: ClassVar[str] = "wavefilter"
    presets: ClassVar[dict[str, dict]] = {
        "paper": {},
        "serve": {
            "proportions": (0.6, 0.6, 0.444), "token_stage": True, "detail_lambda": 0.5, "reselect": "drift:0.9",
            "query_set": "masked", "keep_sink": 16, "keep_tail": 64,
        },
        "serve-page": {
            "levels": 4, "granularity": "page", "proportions": (0.16,), "detail_lambda": 0.5, "reselect": "step",
            "query_set": "masked", "keep_sink": 16, "keep_tail": 64,
        },
    }  # fmt: skip

    wavelet: str = "haar"  # psi: any orthogonal one PyWavelets knows
    levels: int = 2  # B
    proportions: tuple[float, ...] | float = (0.4, 0.4)  # m_B … m_1, then of the token stage; one for all: repeated
    budget: float | None = None  # instead: the share (below 1) or number of prompt tokens kept, spread over the scales
    normalization: Literal["orthonormal", "mean"] = "orthonormal"  # of the bands: logits 2^(b/2) sharper, or not
    head_mode: Literal["per_kv_head", "shared"] = "per_kv_head"
    query_set: Literal["active", "masked"] = "active"  # who votes: all rows of the step, or those to be decided
    agg: Reduction = "softmax_sum"
    detail_lambda: float = 0.0
    token_stage: bool = False
    reselect: str = "step"  # "step", "refresh", "every:R" (steps) or "drift:T" (overlap of the coarsest scale below T)
    granularity: Literal["token", "page"] = "token"  # page: runs of 2^levels tokens, chosen at the coarsest scale
    keep_sink: int = 0  # first tokens of the prompt that always stay
    keep_tail: int = 0  # last ones; both together take an eighth of what is kept at most
    min_prompt: int = 512  # shorter ones are read whole
    dense_layers: tuple[int, ...] = ()  # these layers read everything

    def __post_init__(self):
        known = [name for family in pywt.families() for name in pywt.wavelist(family) if is_orthogonal(name)]
        check(self.wavelet in known, "wavelet", self.wavelet, f"an orthogonal wavelet: {', '.join(known)}")
        check(1 <= self.levels <= 4, "levels", self.levels, "1 to 4")
        given = self.proportions if isinstance(self.proportions, tuple) else (self.proportions,)
        check(
            len(given) in (1, self.stages) and all(isinstance(m, (int, float)) and 0 < m <= 1 for m in given),
            "proportions", self.proportions, f"one number in (0, 1], or {self.stages} of them: one for each scale",
        )  # fmt: skip
        check(self.budget is None or self.budget > 0, "budget", self.budget, "a share below 1 or a number of tokens")
        check(self.detail_lambda >= 0, "detail_lambda", self.detail_lambda, "at least 0")
        check(
            not self.detail_lambda or self.wavelet == "haar", "detail_lambda", self.detail_lambda,
            "0 with wavelets other than haar, whose details belong to no block",
        )  # fmt: skip
        check(
            not (self.token_stage and self.granularity == "page"), "token_stage", self.token_stage,
            "off with granularity 'page'",
        )  # fmt: skip
        check(
            not (self.wavelet != "haar" and self.granularity == "page"), "granularity", self.granularity,
            "'token' with wavelets other than haar",
        )  # fmt: skip
        check(self.keep_sink >= 0, "keep_sink", self.keep_sink, "at least 0")
        check(self.keep_tail >= 0, "keep_tail", self.keep_tail, "at least 0")
        check(
            reselection(self.reselect) is not None,
            "reselect",
            self.reselect,
            "'step', 'refresh', 'every:R' or 'drift:T'",
        )

    # -- what the fields come to -----------------------------------------------------------

    @property
    def scales(self) -> range:
        """From the coarsest to the finest; scale 0 is single tokens."""
        if self.granularity == "page":
            return range(self.levels, self.levels - 1, -1)
        return range(self.levels, -1 if self.token_stage else 0, -1)

    @property
    def stages(self) -> int:
        return len(self.scales)

    @property
    def unit(self) -> int:
        return 2 ** self.scales[-1]

    def pinned(self, prompt_len: int) -> tuple[int, int]:
        """First and last tokens that always stay. Those beyond the last coarse run stay anyway."""
        runs = prompt_len // 2**self.levels
        room = self.kept(runs)[-1] * self.unit / 8
        wanted = self.keep_sink + self.keep_tail
        share = min(1.0, room / wanted) if wanted else 0.0
        return int(share * self.keep_sink), max(0, int(share * self.keep_tail) - prompt_len % 2**self.levels)

    def kept(self, runs: int) -> list[int]:
        """How many runs stay at each scale, of so many at the coarsest."""
        if self.budget is not None:
            share = self.budget if self.budget < 1 else min(1.0, self.budget / (runs * 2**self.levels))
            shares = [share ** (1 / self.stages)] * self.stages
        else:
            given = self.proportions if isinstance(self.proportions, tuple) else (self.proportions,)
            shares = list(given) * (self.stages if len(given) == 1 else 1)
        kept = []
        for share in shares:
            kept.append(max(math.ceil(share * runs - 1e-9), 1))
            runs = 2 * kept[-1]
        return kept

    @property
    def _reselect(self) -> tuple[str, float]:
        return reselection(self.reselect) or ("step", 0.0)

    # -- what the engine asks --------------------------------------------------------------

    def applies(self, prompt_len: int, length: int) -> bool:
        runs = prompt_len // 2**self.levels
        if prompt_len < self.min_prompt or runs < 1:
            return False
        return self.kept(runs)[-1] * self.unit < runs * 2**self.levels

    def sees_all(self, layer: int) -> bool:
        return layer in self.dense_layers

    def keeps(self, steps: int) -> bool:
        kind, number = self._reselect
        return kind == "refresh" or (kind == "every" and steps % int(number) != 0)

    def chosen_from(self, prompt_len: int) -> int:
        return prompt_len // 2**self.levels * 2**self.levels

    def summary_rows(self, prompt_len: int) -> int:
        return prompt_len // 2**self.levels

    def vectors(self, dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        return (dim, dtype), (dim if self.detail_lambda else 0, dtype)

    def summarise(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = keys[: len(keys) // 2**self.levels * 2**self.levels]
        if self.wavelet != "haar":
            band = self._band(whole.transpose(0, 1), self.levels).transpose(0, 1)
            return band, band[..., :0]
        mean, variance = mean_and_variance(whole.unflatten(0, (-1, 2**self.levels)).transpose(1, 2))
        return mean, variance.sqrt() if self.detail_lambda else mean[..., :0]

    def choose(self, asked: Asked) -> Choice:
        prompt = asked.prompt
        if prompt is None:
            raise NotImplementedError(f"{self.name} chooses among the keys of a cached prompt alone")
        q = asked.electing(self.query_set)[0]
        mean, spread = (vectors[0] for vectors in asked.summaries.by_head(None))  # [Hkv, R, D]
        coarse, *finer = self.kept(mean.shape[1])
        pins = self.pinned(prompt.prompt_len)
        runs = self._best(q, mean, spread, self.levels, coarse, pins)  # [Hkv, coarse]
        scored, top, previous = mean.shape[1], runs, prompt.previous
        if self._reselect[0] == "drift" and previous is not None and self._overlap(top, previous.memo):
            return Choice(previous.units, scored, previous.memo)
        if finer:
            kv = prompt.read(runs, 2**self.levels)  # [Hkv, n, 2^levels, 2 * D] of the runs that are left
        for scale, count in zip(self.scales[1:], finer, strict=True):
            # each run falls into two, each with its half of the keys
            inside = (2 * runs[..., None] + torch.arange(2, device=runs.device)).flatten(1)
            kv = kv.unflatten(2, (2, -1)).flatten(1, 2)
            best = self._best(q, *self._describe(kv.chunk(2, -1)[0], scale), scale, count, pins).long()
            scored += inside.shape[1]
            runs = inside.gather(1, best)
            if scale > self.scales[-1]:
                row = best + torch.arange(len(best), device=best.device)[:, None] * kv.shape[1]
                kv = kv.flatten(2).flatten(0, 1).index_select(0, row.flatten()).view(*best.shape, *kv.shape[2:])
        return Choice(runs.to(torch.int32)[None], scored, top)

    # -- one scale -------------------------------------------------------------------------

    def _describe(self, keys: torch.Tensor, scale: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys of runs [Hkv, n, 2^scale, D] -> their band and its spread, [Hkv, n, D] each"""
        if self.wavelet != "haar":
            return self._band(keys.flatten(1, 2), scale).to(keys.dtype), None
        if scale == 0:
            return keys[:, :, 0], None
        if scale == 1:  # of two numbers, mean and deviation are half of sum and difference
            even, odd = keys[:, :, 0], keys[:, :, 1]
            return (even + odd).mul_(0.5), (even - odd).mul_(0.5).abs_() if self.detail_lambda else None
        mean, variance = mean_and_variance(keys)
        return mean.to(keys.dtype), variance.sqrt_().to(keys.dtype)

    def _band(self, keys: torch.Tensor, scale: int) -> torch.Tensor:
        """[Hkv, N, D] -> low-pass band in units of a mean, [Hkv, N / 2^scale, D]"""
        return lowpass(keys, tuple(pywt.Wavelet(self.wavelet).dec_lo), scale) / 2 ** (scale / 2)

    def _best(self, q, mean, spread, scale: int, count: int, pins: tuple[int, int]) -> torch.Tensor:
        """The `count` runs voted for, [Hkv, count], as places in what is described [Hkv, n, D], ascending."""
        if self.normalization == "orthonormal":
            q = q * 2 ** (scale / 2)
        sink, tail = (-(-tokens // 2**scale) for tokens in pins)  # they come first and last at every scale
        if self.detail_lambda and spread is not None:
            kind = "vector"
        else:
            kind, spread = "l2", torch.zeros(*mean.shape[:2], 1, dtype=mean.dtype, device=mean.device)
        lam = self.detail_lambda if kind == "vector" else 0.0
        scores = run_scores(q, mean, spread, kind, mean.shape[1] - tail, sink, lam, self.agg)[0]
        if self.head_mode == "shared":
            scores = scores.sum(0, keepdim=True).expand(len(scores), -1).contiguous()
        return top_pages(scores[None], count)[0]

    def _overlap(self, top: torch.Tensor, before: torch.Tensor | None) -> bool:
        """Whether the coarsest choice is still much the same."""
        if before is None:
            return False
        most = int(max(top.max(), before.max())) + 1
        known = torch.zeros(len(top), most, dtype=torch.bool, device=top.device).scatter_(1, before.long(), True)
        return bool(known.gather(1, top.long()).float().mean() >= self._reselect[1])


def reselection(text: str) -> tuple[str, float] | None:
    """When it is chosen anew: "kind" or "kind:number"; None: neither."""
    kind, _, number = text.partition(":")
    try:
        value = float(number) if number else 0.0
    except ValueError:
        return None
    ok = {
        "step": not number,
        "refresh": not number,
        "every": value >= 1 and value == int(value),
        "drift": 0 < value <= 1,
    }
    return (kind, value) if ok.get(kind) else None


def is_orthogonal(name: str) -> bool:
    try:
        return pywt.Wavelet(name).orthogonal
    except ValueError:  # continuous ones
        return False
