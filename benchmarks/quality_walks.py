"""Long answers of which every word needs the one before, under every decoding and every reuse: walks along shuffled
arrows, as long as the canvas lets them be, on the checkpoint that knows nothing else (examples/demo/walks.py).

One token per step answers them. Whatever fills more at once must notice by itself
which tokens are known already (the arrows) and which are not yet (the words).
"""

from itertools import product
from pathlib import Path

import numpy as np

from benchmarks import drawing, quality_rules, report
from benchmarks.quality_rules import REUSES, SHOWN, Rule, marks, rules

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "demo" / "walker"
BLOCK = 32
#: canvas -> answers of a cell: with its length all of them take longer
ANSWERS = {32: 40, 128: 10, 512: 4}
QUARTER = "low_confidence, a quarter of the steps"

_rest = {column.key: column for column in quality_rules.COLUMNS}
COLUMNS = [
    *(_rest[key] for key in ("decoding", "reuse", "canvas", "answers", "exact_match", "interval")),
    report.Column("begun", "right before the first wrong token", "{:.1%}"),
    _rest["forwards"], _rest["rows"],
]  # fmt: skip
NOTES = [
    f"Greedy, canvas blocks of {BLOCK}, ended by the end token. Exact match: the whole answer, end token included; "
    "beside it Wilson's interval.",
    "Answers have 30, 126 and 250 tokens on canvases of 32, 128 and 512: 14, 62 and 124 words, with an arrow each.",
    quality_rules.NOTES[1],
    "half, a quarter of the steps: two, four tokens in each, whatever their probability.",
    "freedave: requests that share a step leave it no drafts; alone it takes 18.2 forwards instead of 32.",
    quality_rules.NOTES[-1],
]


def cells(quick: bool):
    """Those of most rows, and so of most time, last"""
    for reuse, canvas in sorted(product(REUSES, ANSWERS), key=lambda each: (each[0] == "none", each[1])):
        for rule in all_rules() if canvas == min(ANSWERS) or not quick else ():
            yield canvas, "full", reuse, rule, rule.asked(canvas) | {"dlm_reuse": reuse}


def all_rules() -> list[Rule]:
    """Half the steps do for answers of which half the tokens are arrows."""
    return [*rules(), Rule(QUARTER, {"dlm_algorithm": "low_confidence"}, fill=4)]


def place(row: dict) -> tuple:
    """Of a row in the table"""
    labels = [rule.label for rule in all_rules()]
    return row["canvas"], REUSES.index(row["reuse"]), labels.index(row["decoding"])


def questions(canvas: int, count: int):
    from examples.demo.tasks import walk, words_of

    rng = np.random.default_rng(canvas)
    return [walk(rng, words_of(canvas)) for _ in range(count)]


def settings() -> dict:
    return {
        "shapes": f"LLaDA of 4 layers, width 192; canvases of {', '.join(map(str, ANSWERS))}, blocks of {BLOCK}",
        "dtype": "float32",
        "baseline": "low_confidence with none: one token per step, the exact model",
        "counted": "whole answers",
        "tasks": "walks along shuffled arrows; prompts of 69, 261 and 509 tokens",
    }


def plot(figure, rows: list[dict]) -> None:
    """Of one reuse policy, a panel per canvas: tokens a forward beside what is right."""
    for axes, row, at in marks(figure, rows, height=0.3):
        axes.plot([100 * end for end in row["interval"]], [at, at], color=drawing.GREY, lw=4, alpha=0.3)
        axes.plot(100 * row["exact_match"], at, "o", color=drawing.BLUE, ms=6)
        axes.text(108, at, f"{row['forwards']:.0f}", va="center", fontsize=7)
        axes.set_xlim(0, 125)
        axes.set_xticks([0, 25, 50, 75, 100])
    middle = figure.axes[len(figure.axes) // 2]
    middle.set_xlabel(f"exact match, %, with {SHOWN}; beside it forwards per answer", fontsize=8)
