"""WaveFilter: scores the prompt's keys at coarse wavelet resolution, refines the best runs and attends to those left.

https://arxiv.org/abs/2606.00724. At scale b the low-pass band of the keys
represents runs of 2^b tokens. The queries of a step vote: softmax over the
runs, summed over queries and the heads of a key head. A proportion m_b of the
runs is kept and refined at the next finer scale, from `levels` down to pairs of
tokens. With Haar the band is the run's mean, so nothing is transformed twice.
The coarsest scale is stored with the KV cache and recomputed when the prompt is
refreshed. Finer scales are means of the remaining keys.

Extensions beyond the paper, off in preset "paper":
- `detail_lambda`: adds a bound on the difference between a mean and its keys, from the energy of the details
- `token_stage`: a last scale of single tokens
- `reselect`: choices that are used for more than one step
- `keep_sink`, `keep_tail`: first and last tokens that are always kept

A choice kept for a whole block becomes stale as tokens are filled. Preset
"serve" therefore scores the coarsest scale in every step, and descends again if
its result has changed.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pywt
import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics, mean_and_variance
from vllm_dlm.kernels.page_scores import Reduction, ScoringQueries, half_scores, page_scores
from vllm_dlm.kernels.top_pages import store_top_pages, top_pages, unless_alike
from vllm_dlm.kernels.wavelet_lowpass import lowpass
from vllm_dlm.plugins.decoding.base import check
from vllm_dlm.plugins.selection.base import CachedPrompts, Choice, ChoiceQuery, PromptUnits, Selection


@dataclass(frozen=True)
class WaveFilter(Selection):
    name: ClassVar[str] = "wavefilter"
    presets: ClassVar[dict[str, dict]] = {
        "paper": {},
        "serve": {
            "proportions": (0.6, 0.6, 0.444),
            "token_stage": True,
            "detail_lambda": 0.5,
            "reselect": "drift:0.9",
            "query_set": "masked",
            "keep_sink": 16,
            "keep_tail": 64,
        },
        "serve-page": {
            "levels": 4,
            "granularity": "page",
            "proportions": (0.16,),
            "detail_lambda": 0.5,
            "reselect": "step",
            "query_set": "masked",
            "keep_sink": 16,
            "keep_tail": 64,
        },
    }

    wavelet: str = "haar"  # psi: any orthogonal wavelet of PyWavelets
    levels: int = 2  # B
    proportions: tuple[float, ...] | float = (0.4, 0.4)  # m_B … m_1, then the token stage; one number is repeated
    budget: float | None = None  # replaces proportions: share (below 1) or number of prompt tokens kept
    normalization: Literal["orthonormal", "mean"] = "orthonormal"  # of the bands: logits times 2^(b/2), or unscaled
    head_mode: Literal["per_kv_head", "shared"] = "per_kv_head"
    query_set: Literal["active", "masked"] = "active"  # rows that vote: all of the step, or those to be decided
    agg: Reduction = "softmax_sum"
    detail_lambda: float = 0.0
    token_stage: bool = False
    reselect: str = "step"  # "step", "refresh", "every:R" (steps) or "drift:T" (overlap of the coarsest scale below T)
    granularity: Literal["token", "page"] = "token"  # page: runs of 2^levels tokens, chosen at the coarsest scale
    keep_sink: int = 0  # first tokens of the prompt that are always kept
    keep_tail: int = 0  # last tokens that are always kept; both together use at most an eighth of the tokens kept
    min_prompt: int = 512  # shorter prompts are read completely
    dense_layers: tuple[int, ...] = ()  # these layers read everything

    def __post_init__(self):
        known = [name for family in pywt.families() for name in pywt.wavelist(family) if is_orthogonal(name)]
        check(self.wavelet in known, "wavelet", self.wavelet, f"an orthogonal wavelet: {', '.join(known)}")
        check(1 <= self.levels <= 4, "levels", self.levels, "1 to 4")
        shares, stages = self.shares, self.stages
        fit = len(shares) in (1, stages) and all(isinstance(m, (int, float)) and 0 < m <= 1 for m in shares)
        check(fit, "proportions", self.proportions, f"one number in (0, 1], or {stages} of them: one for each scale")
        check(self.budget is None or self.budget > 0, "budget", self.budget, "a share below 1 or a number of tokens")
        haar, page, detail = self.wavelet == "haar", self.granularity == "page", self.detail_lambda
        check(detail >= 0, "detail_lambda", detail, "at least 0")
        check(haar or not detail, "detail_lambda", detail, "0 with wavelets other than haar")
        check(not (self.token_stage and page), "token_stage", self.token_stage, "off with granularity 'page'")
        check(haar or not page, "granularity", self.granularity, "'token' with wavelets other than haar")
        check(self.keep_sink >= 0, "keep_sink", self.keep_sink, "at least 0")
        check(self.keep_tail >= 0, "keep_tail", self.keep_tail, "at least 0")
        known_kind = reselection(self.reselect) is not None
        check(known_kind, "reselect", self.reselect, "'step', 'refresh', 'every:R' or 'drift:T'")

    # -- quantities derived from the fields ------------------------------------------------

    @property
    def shares(self) -> tuple[float, ...]:
        return self.proportions if isinstance(self.proportions, tuple) else (self.proportions,)

    @property
    def scales(self) -> range:
        """Scales from the coarsest to the finest; scale 0 is single tokens."""
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
        """Number of first and last tokens that are always kept. Tokens after the last coarse run are read anyway and so
        are subtracted."""
        runs = prompt_len // 2**self.levels
        room = self.kept(runs)[-1] * self.unit / 8
        wanted = self.keep_sink + self.keep_tail
        share = min(1.0, room / wanted) if wanted else 0.0
        return int(share * self.keep_sink), max(0, int(share * self.keep_tail) - prompt_len % 2**self.levels)

    def kept(self, runs: int) -> list[int]:
        """Number of runs kept at each scale. `runs`: number of runs at the coarsest scale."""
        if self.budget is not None:
            share = self.budget if self.budget < 1 else min(1.0, self.budget / max(runs * 2**self.levels, 1))
            shares = [share ** (1 / self.stages)] * self.stages
        else:
            shares = list(self.shares) * (self.stages if len(self.shares) == 1 else 1)
        kept = []
        for share in shares:
            kept.append(max(math.ceil(share * runs - 1e-9), 1))
            runs = 2 * kept[-1]
        return kept

    @property
    def _reselect(self) -> tuple[str, float]:
        return reselection(self.reselect) or ("step", 0.0)

    # -- interface to the engine -----------------------------------------------------------

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

    def vectors(self, dim: int, dtype: torch.dtype) -> tuple[tuple[int, torch.dtype], tuple[int, torch.dtype]]:
        return (dim, dtype), (dim if self.detail_lambda else 0, dtype)

    def prompt_units(self, prompt_len: int) -> PromptUnits:
        runs = prompt_len // 2**self.levels
        kept = self.kept(runs)
        # with one scale there is no descent to save by keeping a choice
        memo = kept[0] if self._reselect[0] == "drift" and self.stages > 1 else 0
        return PromptUnits(runs * 2**self.levels, runs, kept[-1], self._numbers(prompt_len, runs, kept), memo)

    def _numbers(self, prompt_len: int, runs: int, kept: list[int]) -> tuple[int, ...]:
        """For each scale: number of runs kept, number of first runs always kept, and the first of the last runs always
        kept."""
        found: list[int] = []
        for scale, number in zip(self.scales, kept, strict=True):
            sink, tail = (-(-tokens // 2**scale) for tokens in self.pinned(prompt_len))
            found += [number, sink, runs - tail]  # runs always kept remain first and last at every scale
            runs = 2 * number
        return tuple(found)

    def summarise(self, keys: torch.Tensor, lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.wavelet != "haar":  # bands are periodic, so each prompt is transformed separately
            bands = [self._band(own.transpose(0, 1), self.levels).transpose(0, 1) for own in keys.split(lens)]
            band = torch.cat(bands)
            return band, band[..., :0]
        mean, variance = mean_and_variance(keys.unflatten(0, (-1, 2**self.levels)).transpose(1, 2))
        return mean, variance.sqrt() if self.detail_lambda else mean[..., :0]

    def choose(self, asked: ChoiceQuery) -> Choice:
        prompts = asked.prompts
        if prompts is None:
            raise NotImplementedError(f"{self.name} only chooses among the keys of cached prompts")
        runs_of = [n // 2**self.levels for n in prompts.prompt_lens]
        kept = [self.kept(runs) for runs in runs_of]
        most = [max(own) for own in zip(*kept, strict=True)]
        scored = sum(runs_of) + sum(2 * n for own in kept for n in own[:-1])
        held, scores, names = prompts.held, self._coarsest(asked, prompts), None
        for stage, scale in enumerate(self.scales[1:], 1):
            runs = top_pages(scores, most[stage - 1], prompts.numbers[3 * stage - 3], names)  # [B, Hkv, n]
            if stage == 1 and held is not None and held.memo.shape[2]:
                # If the coarsest choice has changed little, no run is refined and the stored choice is used again.
                runs = unless_alike(runs, held.memo, held.rows, held.known, self._reselect[1])
            scores, names = self._halves(asked, prompts, runs, scale, prompts.numbers[3 * stage - 3 : 3 * stage + 3])
        last = scores, most[-1], prompts.numbers[-3], names
        if held is None:
            return Choice(top_pages(*last), scored)
        store_top_pages(held.units, held.rows, *last)
        return Choice(None, scored)

    # -- one scale -------------------------------------------------------------------------

    def _coarsest(self, asked: ChoiceQuery, prompts: CachedPrompts) -> torch.Tensor:
        """Votes for the runs of the coarsest scale, [B, Hkv, N]"""
        _, sinks, forced_from = prompts.numbers[:3].unbind()
        statistics = PageStatistics(*asked.summaries.by_place(), 2**self.levels, self._spread)
        queries = self._queries(asked, self.levels, self.detail_lambda)
        return self._of_heads(page_scores(queries, statistics, asked.table, asked.counts, forced_from, sinks))

    def _halves(
        self, asked: ChoiceQuery, prompts: CachedPrompts, runs: torch.Tensor, scale: int, numbers: torch.Tensor
    ):
        """Votes for the halves of the runs kept at the scale above, and their indices as runs of 2^scale tokens,
        [B, Hkv, n] each"""
        above, _, _, _, sinks, forced_from = numbers.unbind()
        if self.wavelet == "haar":
            queries, cache = self._queries(asked, scale, self.detail_lambda), (prompts.cache, prompts.table)
            scores, halves = half_scores(queries, *cache, runs, 2**scale, forced_from, sinks)
            return self._of_heads(scores), halves
        keys, counts = prompts.keys(runs, 2 ** (scale + 1)).flatten(2, 3), 2 * above
        band = self._band(keys, scale, None if len(runs) == 1 else counts << scale).to(keys.dtype)
        statistics = PageStatistics(band, band, 2**scale, "none")
        table, counts = torch.arange(len(runs), device=runs.device)[:, None], counts * (runs[:, 0, 0] >= 0)
        queries = self._queries(asked, scale, 0.0)
        scores = page_scores(queries, statistics, table, counts, forced_from, sinks)
        halves = (2 * runs[..., None] + torch.arange(2, dtype=runs.dtype, device=runs.device)).flatten(2)
        return self._of_heads(scores), halves

    @property
    def _spread(self) -> str:
        return "vector" if self.detail_lambda else "none"

    def _queries(self, asked: ChoiceQuery, scale: int, lam: float) -> ScoringQueries:
        sharpness = 2 ** (scale / 2) if self.normalization == "orthonormal" else 1.0
        return asked.scoring(self.query_set, lam, self.agg, sharpness)

    def _band(self, keys: torch.Tensor, scale: int, counts: torch.Tensor | None = None) -> torch.Tensor:
        """[..., Hkv, N, D] -> low-pass band, scaled like a mean, [..., Hkv, N / 2^scale, D]"""
        return lowpass(keys, tuple(pywt.Wavelet(self.wavelet).dec_lo), scale, counts) / 2 ** (scale / 2)

    def _of_heads(self, scores: torch.Tensor) -> torch.Tensor:
        """Votes [B, Hkv, N] per key head, or summed over all key heads."""
        return scores if self.head_mode == "per_kv_head" else scores.sum(1, keepdim=True).expand(scores.shape)


def reselection(text: str) -> tuple[str, float] | None:
    """Parses `reselect`, "kind" or "kind:number"; None if invalid."""
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
    except ValueError:  # continuous wavelets
        return False
