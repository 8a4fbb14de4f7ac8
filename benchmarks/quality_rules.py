"""How many tokens may be filled at once, under which reuse, on a canvas how long: exact match and forwards per answer
of every registered decoding, on the demo checkpoint.

Tasks whose tokens depend on each other (chains, running totals, sums, several
codes), and canvases up to many times the answer, which is what spoils them.
"""

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks import drawing, report
from vllm_dlm.engine.denoiser import Observer
from vllm_dlm.methods import methods

BLOCK, THRESHOLD = 8, 0.9
CANVASES = (32, 128, 512)
WINDOW = 32
REUSES = ("none", "fast_dllm", "dllm_cache", "dyllm")
SHOWN = "fast_dllm"  # in the picture

COLUMNS = [
    report.Column("decoding", "decoding"),
    report.Column("reuse", "reuse"),
    report.Column("extent", "extent"),
    report.Column("canvas", "canvas"),
    report.Column("answers", "answers"),
    report.Column("exact_match", "exact match", "{:.1%}"),
    report.Column("interval", "95% interval", lambda ends: f"{ends[0]:.1%} to {ends[1]:.1%}"),
    report.Column("forwards", "forwards per answer", "{:.1f}"),
    report.Column("rows", "rows recomputed per answer", "{:,.0f}"),
]

NOTES = [
    f"Demo checkpoint, greedy, canvas blocks of {BLOCK}, ended by the end token. Exact match: the whole answer, end "
    "token included; beside it Wilson's interval.",
    f"threshold: {THRESHOLD}, with threshold_decay .3 in `low_confidence, threshold, decay`; of `credit` too. Others "
    "are at their defaults: one token per step, or their own rule.",
    "half the steps: two tokens in each, whatever their probability.",
    "freedave: sixteen requests share a step, which leaves each a draft or two; alone it takes 5.3 forwards here.",
    f"window: {WINDOW} positions behind the canvas block and the last one have rows.",
    "forwards: steps of a request. rows recomputed: through the feed-forward, averaged over layers, with the prompt's.",
]


@dataclass(frozen=True)
class Rule:
    label: str
    options: dict  # of a request
    fill: int = 1  # so many tokens in each step

    def asked(self, canvas: int) -> dict:
        """Options of a request with such a canvas"""
        return self.options | ({"dlm_steps": canvas // self.fill} if self.fill > 1 else {})


def rules() -> list[Rule]:
    """Every registered decoding; beside the first the threshold, which goes with all that rank by confidence."""
    own = {"credit": {"dlm_threshold": THRESHOLD}}
    found = [
        Rule(f"{name}, threshold" if name in own else name, {"dlm_algorithm": name} | own.get(name, {}))
        for name in sorted(methods("decoding"))
    ]
    sure = {"dlm_algorithm": "low_confidence", "dlm_threshold": THRESHOLD}
    decay = {"dlm_threshold_decay": 0.3}
    return [
        *found,
        Rule("low_confidence, half the steps", {"dlm_algorithm": "low_confidence"}, fill=2),
        Rule("low_confidence, threshold", sure),
        Rule("low_confidence, threshold, decay", sure | decay),
    ]


def cells(quick: bool):
    extents = {"full": {"dlm_extent": "full"}, "window": {"dlm_extent": "window", "dlm_window": WINDOW}}
    canvases = CANVASES[:1] if quick else CANVASES
    for canvas, extent, reuse, rule in product(canvases, extents, REUSES, rules()):
        if canvas > BLOCK + WINDOW + 1 or extent == "full":  # else they are the same
            yield canvas, extent, reuse, rule, rule.asked(canvas) | extents[extent] | {"dlm_reuse": reuse}


def place(row: dict) -> tuple:
    """Of a row in the table"""
    labels = [rule.label for rule in rules()]
    return row["canvas"], row["extent"], REUSES.index(row["reuse"]), labels.index(row["decoding"])


def questions(count: int):
    """In equal shares"""
    from examples.demo import tasks

    rng, filler = np.random.default_rng(47), tasks.Filler(7)
    kinds = [
        tasks.follow, tasks.totals, tasks.add,
        *(lambda rng, n=n: tasks.recall(rng, filler, 192, needles=8, queried=n) for n in (2, 3)),
    ]  # fmt: skip
    return [kinds[index % len(kinds)](rng) for index in range(count)]


class Sums(Observer):
    """Forwards of requests, and rows through the feed-forward of a layer."""

    def __init__(self, layers: int):
        self.layers, self.forwards, self.rows = layers, 0, 0.0

    def step_ended(self, requests, counts) -> None:
        self.forwards += len(requests)
        self.rows += counts.rows["feed_forward"] / self.layers


def measure(engine, canvas: int, options: dict, samples, block: int = BLOCK) -> dict:
    from vllm import SamplingParams

    denoiser = engine.runner.denoiser
    sums = Sums(len(denoiser.model.model.layers))
    params = SamplingParams(
        temperature=0, max_tokens=canvas, seed=0, detokenize=False,
        extra_args={"dlm_block_length": block} | options,
    )  # fmt: skip
    denoiser.observers.append(sums)
    try:
        outputs = engine.llm.generate([{"prompt_token_ids": s.prompt_ids} for s in samples], params, use_tqdm=False)
    finally:
        denoiser.observers.remove(sums)
    pairs = [(list(o.outputs[0].token_ids), sample.answer_ids) for o, sample in zip(outputs, samples, strict=True)]
    right = sum(given == answer for given, answer in pairs)
    return {
        "answers": len(samples), "exact_match": right / len(samples), "interval": wilson(right, len(samples)),
        "begun": sum(agreeing(*pair) / len(pair[1]) for pair in pairs) / len(samples),
        "forwards": sums.forwards / len(samples), "rows": sums.rows / len(samples),
    }  # fmt: skip


def agreeing(given: list[int], answer: list[int]) -> int:
    """Tokens before the first wrong one"""
    wrong = [at for at, (one, other) in enumerate(zip(given, answer, strict=False)) if one != other]
    return wrong[0] if wrong else min(len(given), len(answer))


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    share, bend = right / count, z * z / count
    middle = (share + bend / 2) / (1 + bend)
    half = z * math.sqrt(share * (1 - share) / count + bend / (4 * count)) / (1 + bend)
    return max(0.0, middle - half), min(1.0, middle + half)


def settings(answers: int) -> dict:
    return {
        "shapes": f"demo checkpoint, canvases of {', '.join(map(str, CANVASES))} tokens, canvas blocks of {BLOCK}",
        "dtype": "float32",
        "baseline": "low_confidence with none on a full canvas of 32: one token per step, the exact model",
        "counted": "whole answers",
        "tasks": "equal shares of follow (a chain of arrows), running totals, add, recall (2 and 3 of 8 codes)",
        "answers": answers,
    }


def plot(figure, rows: list[dict]) -> None:
    """Of one reuse policy, whose answers are those of `none`: exact match by decoding, a panel per canvas; filled dots
    are full canvases, open ones windows."""
    for axes, row, at in marks(figure, rows, height=0.34):
        full = row["extent"] == "full"
        colour = drawing.GREY if full else drawing.BLUE
        axes.plot([100 * end for end in row["interval"]], [at, at], color=colour, lw=4, alpha=0.25)
        axes.plot(100 * row["exact_match"], at, "o", color=colour, mfc=colour if full else "white", ms=6)
        axes.set_xlim(0, 100)
    shortest = {row["decoding"]: row["forwards"] for row in reversed(rows) if row["reuse"] == SHOWN}
    panels, names = figure.axes, list(dict.fromkeys(row["decoding"] for row in rows if row["reuse"] == SHOWN))
    panels[0].set_yticks(
        range(len(names), 0, -1), [f"{name}\n{shortest[name]:.1f} forwards" for name in names], fontsize=7
    )
    panels[len(panels) // 2].set_xlabel(
        f"exact match, %, with {SHOWN}: grey with rows to the end of the canvas, blue with a window of {WINDOW}",
        fontsize=8,
    )


def marks(figure, rows: list[dict], height: float):
    """-> (axes, row, how high) of each row of the shown policy: decodings down the side, a panel per canvas"""
    own = [row for row in rows if row["reuse"] == SHOWN]
    names = list(dict.fromkeys(row["decoding"] for row in own))
    figure.set_size_inches(9, 1.2 + height * len(names))
    canvases = sorted({row["canvas"] for row in own})
    panels = figure.subplots(1, len(canvases), sharey=True, squeeze=False)[0]
    for axes, canvas in zip(panels, canvases, strict=True):
        for row in (row for row in own if row["canvas"] == canvas):
            yield axes, row, len(names) - names.index(row["decoding"])
        axes.set_title(f"canvas of {canvas}", fontsize=9)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
    panels[0].set_yticks(range(len(names), 0, -1), names, fontsize=7)
