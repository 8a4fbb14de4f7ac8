"""How many tokens may be filled at once: exact match and forwards per answer of every registered decoding under every
reuse policy, in two tables.

- quality-rules: tasks whose tokens depend on each other (chains, running totals, sums, several codes), on canvases up
  to many times as long as the answer, which is what spoils answers.
- quality-walks: long answers of which every word needs the one before, on a checkpoint made for it
  (examples/demo/walks.py). One token per step answers them. A decoding that fills more must find out which tokens are
  known already (the arrows) and which are not yet (the words).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from benchmarks.lib import plots
from benchmarks.lib.models import WALKER
from benchmarks.lib.report import Column, columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import wilson

RULES, WALKS = "quality-rules", "quality-walks"
BLOCK, WALK_BLOCK, THRESHOLD, WINDOW = 8, 32, 0.9, 32
CANVASES, ANSWERS = (32, 128, 512), 60
#: canvas -> answers of a cell
WALK_ANSWERS = {32: 40, 128: 10, 512: 4}
REUSES = ("none", "fast_dllm", "dllm_cache", "dyllm")
SHOWN = "fast_dllm"  # in the plots
QUARTER = "low_confidence, a quarter of the steps"
COLUMNS = columns(
    """
    decoding | decoding
    reuse | reuse
    extent | extent
    canvas | canvas
    answers | answers
    exact_match | exact match | {:.1%}
    begun | right before the first wrong token | {:.1%}
    forwards | forwards per answer | {:.1f}
    rows | rows recomputed per answer | {:,.0f}
    failed | failed
    """
)
COLUMNS.insert(6, Column("interval", "95% interval", lambda ends: f"{ends[0]:.1%} to {ends[1]:.1%}"))
OF_RULES = [column for column in COLUMNS if column.key != "begun"]
OF_WALKS = [column for column in COLUMNS if column.key != "extent"]
NOTES = [
    "Greedy, ended by the end token. Exact match: the whole answer, end token included, with Wilson's interval.",
    f"threshold: {THRESHOLD}, with threshold_decay 0.3 in `low_confidence, threshold, decay`; of `credit`, too. Others "
    "are at their defaults: one token per step, or their own rule. half, a quarter of the steps: two, four tokens in "
    "each, whatever their probability.",
    "forwards: steps of a request. rows recomputed: through the feed-forward, averaged over layers, the prompt's "
    "included.",
]
RULES_NOTES = [
    f"Demo checkpoint, canvas blocks of {BLOCK}. window: {WINDOW} positions after the canvas block and the last one "
    "have rows.",
    "freedave: sixteen requests share a step, which leaves each a draft or two; alone it takes 5.3 forwards here.",
]
WALKS_NOTES = [
    f"Canvas blocks of {WALK_BLOCK}. Answers have 30, 126 and 250 tokens on canvases of 32, 128 and 512: 14, 62 and "
    "124 words, with an arrow each.",
    "freedave: requests that share a step leave it no drafts; alone it takes 18.2 forwards instead of 32.",
]


@dataclass(frozen=True)
class Rule:
    label: str
    options: dict  # request options
    fill: int = 1  # tokens per step

    def options_of(self, canvas: int) -> dict:
        return self.options | ({"dlm_steps": canvas // self.fill} if self.fill > 1 else {})


@dataclass(frozen=True)
class Case:
    rule: Rule
    reuse: str
    extent: str
    canvas: int
    answers: int

    @property
    def options(self) -> dict:
        """Options of a request"""
        extent = {"dlm_extent": self.extent} | ({"dlm_window": WINDOW} if self.extent == "window" else {})
        return self.rule.options_of(self.canvas) | extent | {"dlm_reuse": self.reuse}


def rules() -> list[Rule]:
    """Every registered decoding, and thresholds of the default one"""
    from vllm_dlm.methods import methods

    own = {"credit": {"dlm_threshold": THRESHOLD}}
    found = [
        Rule(f"{name}, threshold" if name in own else name, {"dlm_decoding": name} | own.get(name, {}))
        for name in sorted(methods("decoding"))
    ]
    plain = {"dlm_decoding": "low_confidence"}
    sure = plain | {"dlm_threshold": THRESHOLD}
    decaying = Rule("low_confidence, threshold, decay", sure | {"dlm_threshold_decay": 0.3})
    return [*found, Rule("low_confidence, half the steps", plain, 2), Rule("low_confidence, threshold", sure), decaying]


def walk_rules() -> list[Rule]:
    """Half the steps suffice for answers of which half the tokens are arrows."""
    return [*rules(), Rule(QUARTER, {"dlm_decoding": "low_confidence"}, fill=4)]


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    answers = {"answers": 5 if options and options.toy else ANSWERS}
    about = {
        "shapes": f"demo checkpoint, canvases of {', '.join(map(str, CANVASES))} tokens, canvas blocks of {BLOCK}",
        "dtype": "float32",
        "baseline": "low_confidence with none on a full canvas of 32: one token per step, the exact model",
        "counted": "whole answers",
        "tasks": "equal shares of follow (a chain of arrows), running totals, add, recall (2 and 3 of 8 codes)",
    }
    walks = about | {
        "shapes": f"LLaDA of 4 layers, width 192; canvases of {', '.join(map(str, CANVASES))}, blocks of {WALK_BLOCK}",
        "baseline": "low_confidence with none: one token per step, the exact model",
        "tasks": "walks along shuffled arrows; prompts of 69, 261 and 509 tokens",
    }
    title = "Tokens filled at once, under every reuse, on canvases of some lengths"
    long = "Tokens filled at once in long answers whose words need each other"
    return {
        RULES: Table(title, OF_RULES, NOTES + RULES_NOTES, about | answers, finished, plot=plot_rules, timed=False),
        WALKS: Table(long, OF_WALKS, NOTES + WALKS_NOTES, walks, finished, plot=plot_walks, timed=False),
    }


def parts(options: argparse.Namespace) -> list[Part]:
    toy = options.toy
    canvases, reuses = (CANVASES[:1], REUSES[:2]) if toy else (CANVASES, REUSES)
    short = [
        Case(rule, reuse, extent, canvas, 5 if toy else ANSWERS)
        for canvas, extent, reuse, rule in product(canvases, ("full", "window"), reuses, rules())
        if canvas > BLOCK + WINDOW + 1 or extent == "full"  # else both extents are the same
    ]
    # Those of most rows, and so of most time, last
    order = sorted(product(reuses, canvases), key=lambda each: (each[0] == "none", each[1]))
    long = [
        Case(rule, reuse, "full", canvas, 2 if toy else WALK_ANSWERS[canvas])
        for reuse, canvas in order
        for rule in walk_rules()
    ]
    return [
        Part("answers", table, "decodings", tuple(Cell(name_of(case), 0.05 if toy else 0.5, case) for case in cases))
        for table, cases in ((RULES, short), (WALKS, long))
    ]


def name_of(case: Case) -> str:
    return f"{case.rule.label}, {case.reuse}, {case.extent}, canvas {case.canvas}"


def opened(part: Part, options: argparse.Namespace):
    from benchmarks.lib import engines, internals
    from benchmarks.suites.quality import start

    walks = part.table == WALKS
    llm = start(1024, WALKER) if walks else start(1024)
    samples: dict[int, list] = {}

    def measure(case: Case) -> dict:
        if case.canvas not in samples:
            make = walk_questions if walks else questions
            samples[case.canvas] = make(case.canvas, case.answers)
        own, sums = samples[case.canvas], internals.StepSums(internals.layers_of(llm))
        options = {"dlm_block_length": WALK_BLOCK if walks else BLOCK} | case.options
        with internals.observing(llm, sums):
            texts = engines.generate(llm, [s.prompt_ids for s in own], engines.sampling(case.canvas, options, seed=0))
        pairs = [(text, sample.answer_ids) for text, sample in zip(texts, own, strict=True)]
        right, count = sum(given == answer for given, answer in pairs), len(pairs)
        row = {"decoding": case.rule.label, "reuse": case.reuse, "extent": case.extent, "canvas": case.canvas}
        row |= {"answers": count, "exact_match": right / count, "interval": wilson(right, count)}
        row["begun"] = sum(agreeing(*pair) / len(pair[1]) for pair in pairs) / count
        return row | {"forwards": sums.forwards / count, "rows": sums.rows / count}

    return measure


def questions(_: int, count: int) -> list:
    """In equal shares"""
    import numpy as np

    from examples.demo import tasks

    rng, filler = np.random.default_rng(47), tasks.Filler(7)
    codes = [lambda rng, n=n: tasks.recall(rng, filler, 192, needles=8, queried=n) for n in (2, 3)]
    kinds = [tasks.follow, tasks.totals, tasks.add, *codes]
    return [kinds[index % len(kinds)](rng) for index in range(count)]


def walk_questions(canvas: int, count: int) -> list:
    import numpy as np

    from examples.demo.tasks import walk, words_of

    rng = np.random.default_rng(canvas)
    return [walk(rng, words_of(canvas)) for _ in range(count)]


def agreeing(given: list[int], answer: list[int]) -> int:
    """Tokens before the first wrong one"""
    wrong = [at for at, (one, other) in enumerate(zip(given, answer, strict=False)) if one != other]
    return wrong[0] if wrong else min(len(given), len(answer))


def finished(rows: list[dict]) -> list[dict]:
    labels = [rule.label for rule in walk_rules()]

    def place(row: dict) -> tuple:
        if "exact_match" not in row:
            return (1,)
        return 0, row["canvas"], row["extent"], REUSES.index(row["reuse"]), labels.index(row["decoding"])

    return sorted(rows, key=place)


def plot_rules(figure, rows: list[dict]) -> None:
    """Exact match by decoding under one reuse policy, whose answers are those of `none`; filled dots are full canvases,
    open ones windows."""
    rows = shown(rows)
    for axes, row, at in marks(figure, rows, height=0.34):
        full = row["extent"] == "full"
        colour = plots.GREY if full else plots.BLUE
        axes.plot([100 * end for end in row["interval"]], [at, at], color=colour, lw=4, alpha=0.25)
        axes.plot(100 * row["exact_match"], at, "o", color=colour, mfc=colour if full else "white", ms=6)
        axes.set_xlim(0, 100)
    shortest = {row["decoding"]: row["forwards"] for row in reversed(rows)}
    panels, names = figure.axes, list(dict.fromkeys(row["decoding"] for row in rows))
    labels = [f"{name}\n{shortest[name]:.1f} forwards" for name in names]
    panels[0].set_yticks(range(len(names), 0, -1), labels, fontsize=7)
    text = f"exact match, %, with {SHOWN}: grey with rows to the end of the canvas, blue with a window of {WINDOW}"
    panels[len(panels) // 2].set_xlabel(text, fontsize=8)


def plot_walks(figure, rows: list[dict]) -> None:
    """Exact match by decoding under one reuse policy, with forwards per answer"""
    for axes, row, at in marks(figure, shown(rows), height=0.3):
        axes.plot([100 * end for end in row["interval"]], [at, at], color=plots.GREY, lw=4, alpha=0.3)
        axes.plot(100 * row["exact_match"], at, "o", color=plots.BLUE, ms=6)
        axes.text(108, at, f"{row['forwards']:.0f}", va="center", fontsize=7)
        axes.set_xlim(0, 125)
        axes.set_xticks([0, 25, 50, 75, 100])
    middle = figure.axes[len(figure.axes) // 2]
    middle.set_xlabel(f"exact match, %, with {SHOWN}; at the right forwards per answer", fontsize=8)


def shown(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row.get("reuse") == SHOWN]


def marks(figure, rows: list[dict], height: float) -> Iterator[tuple]:
    """-> (axes, row, height of its line): decodings on the y axis, a panel per canvas"""
    names = list(dict.fromkeys(row["decoding"] for row in rows))
    figure.set_size_inches(9, 1.2 + height * len(names))
    canvases = sorted({row["canvas"] for row in rows})
    panels = figure.subplots(1, max(1, len(canvases)), sharey=True, squeeze=False)[0]
    for axes, canvas in zip(panels, canvases, strict=False):
        for row in (row for row in rows if row["canvas"] == canvas):
            yield axes, row, len(names) - names.index(row["decoding"])
        axes.set_title(f"canvas of {canvas}", fontsize=9)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
    panels[0].set_yticks(range(len(names), 0, -1), names, fontsize=7)
