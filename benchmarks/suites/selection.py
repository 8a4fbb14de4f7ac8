"""What selections of cached prompt keys keep: answers and attention mass, on the demo checkpoint, at equal budgets.

Several needles are hidden in a prompt and some are asked for. The prompt is cached (Fast-dLLM, dual); every later step
reads only what the rule chose. The project's rules are compared with those of selection_rules.py.
"""

import argparse
from dataclasses import dataclass, replace

import torch

from benchmarks.lib import plots
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import recall_questions
from benchmarks.suites.quality import BLOCK, CANVAS, exact_match, start

PAGE = 16
LENGTHS, BUDGETS, PROMPTS = (256, 512, 1024, 2048), (0.25, 0.16, 0.09, 0.0625), 100
COLUMNS = columns(
    """
    rule | rule
    budget | prompt kept | {:.2%}
    tokens | prompt tokens
    prompts | prompts
    exact_match | exact match | {:.1%}
    vs_dense | points vs dense | {:+.1f}
    mass | attention mass kept | {:.1%}
    of_oracle | of the oracle's | {:.1%}
    kept | tokens read of prompt | {:.1%}
    failed | failed
    """
)
NOTES = [
    f"Demo checkpoint, float32, greedy, canvas of {CANVAS} tokens, blocks of {BLOCK}, one token per step, reuse "
    "fast_dllm (dual); needles hidden in the prompt, some of them asked for. Exact match: the whole answer, end token "
    "included.",
    "attention mass kept: share of the attention that masked rows would pay to the prompt's tokens, summed over "
    "layers, heads and steps, that falls on what was kept; of the oracle's: against the tokens of most mass, as many "
    "per key head, for the same queries and keys.",
    "unique, mean only and quest: rows that are still masked choose, the best score of any of them and of the heads of "
    "a key head counts; the first page and the last two are always read.",
]


@dataclass(frozen=True)
class Case:
    table: str  # "pages" or "tokens"
    tokens: int
    share: float
    rule: str  # "dense": everything is read
    prompts: int
    needles: int


def page_rules(tokens: int, share: float) -> dict:
    from benchmarks.suites.selection_rules import Quest
    from vllm_dlm.plugins.selection.unique import Unique

    common = {"page_size": PAGE, "budget_tokens": int(share * tokens) // PAGE * PAGE, "min_context": 0}
    common |= {"dense_layers": (), "sink_pages": 1, "recent_pages": 2}
    return {
        "unique (mean + spread)": Unique(**common),
        "mean only": Unique(lam=0.0, **common),
        "quest (min, max)": Quest(**common),
        "unique, vector spread, lam 1": Unique(lam=1.0, std_kind="vector", **common),
        "unique, all rows choose": Unique(query_set="active", **common),
    }


def token_rules(share: float) -> dict:
    from benchmarks.suites.selection_rules import Oracle, Random, SparseDLLM
    from vllm_dlm.plugins.selection.wavefilter import WaveFilter

    serve = WaveFilter(**WaveFilter.presets["serve"], min_prompt=0)
    pages = WaveFilter(granularity="page", levels=2, proportions=share, min_prompt=0)
    levels = 4 if share < 0.08 else 2  # the paper's form: two scales, four for the smallest budget
    return {
        "wavefilter/paper": WaveFilter(levels=levels, proportions=share ** (1 / levels), min_prompt=0),
        "wavefilter/serve": replace(serve, proportions=(0.6, 0.6, share / 0.36)),
        "wavefilter/serve, every step": replace(serve, proportions=(0.6, 0.6, share / 0.36), reselect="step"),
        "block mean": pages,
        "block mean + spread": replace(pages, detail_lambda=0.5),
        "sparse-dllm": SparseDLLM(share),
        "oracle": Oracle(share),
        "random": Random(share),
    }


def add_arguments(parser) -> None:
    parser.add_argument("--needles", type=int, help="hidden in each prompt (default 8, of which 2 are asked for)")


def needles_of(options: argparse.Namespace | None) -> tuple[int, int]:
    """Hidden ones, and those asked for"""
    count = (options and options.needles) or 8
    return count, min(2, count)


def stem(table: str, options: argparse.Namespace | None) -> str:
    count, _ = needles_of(options)
    return f"selection-{table}" + ("" if count == 8 else f"-{count}-needles")


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    count, queried = needles_of(options)
    settings = {
        "shapes": f"demo checkpoint, canvas of {CANVAS}, blocks of {BLOCK}, {count} needle{'s' * (count > 1)} in a "
        f"prompt, {queried} asked for",
        "dtype": "float32",
        "baseline": "fast_dllm (dual) that reads all cached keys (dense)",
        "counted": "whole answers, and attention weight of masked rows on what is kept",
        "needles": count,
        "asked for": queried,
    }
    return {
        stem(table, options): Table(
            f"{table.capitalize()} of the prompt by what rule",
            COLUMNS,
            NOTES,
            settings | {"page": PAGE if table == "pages" else None},
            finished,
            plot=plot,
            timed=False,
        )
        for table in ("pages", "tokens")
    }


def parts(options: argparse.Namespace) -> list[Part]:
    lengths, budgets = ((256,), (0.25,)) if options.toy else (LENGTHS, BUDGETS)
    count, _ = needles_of(options)
    made = []
    for table in ("pages", "tokens"):
        cases = []
        for tokens in lengths:
            if table == "pages" and tokens < 512 and not options.toy:
                continue  # the pages that are always read fill the budget
            wanted = [(1.0, "dense")]
            for share in budgets[:2] if table == "pages" else budgets:
                rules = page_rules(tokens, share) if table == "pages" else token_rules(share)
                wanted += [(share, name) for name in rules]
            prompts = 4 if options.toy else PROMPTS
            cases += [Case(table, tokens, share, rule, prompts, count) for share, rule in wanted]
        cells = [Cell(f"{case.rule}, {case.share:.2%} of {case.tokens}", 0.5, case) for case in cases]
        made.append(Part("selection", stem(table, options), table, tuple(cells)))
    return made


def opened(part: Part, options: argparse.Namespace):
    llm = start(max(cell.work.tokens for cell in part.cells) + 64)
    samples: dict[int, list] = {}

    def measure(case: Case) -> dict:
        if case.tokens not in samples:
            queried = min(2, case.needles)
            samples[case.tokens] = recall_questions(case.prompts, case.tokens, 47, 11, case.needles, queried)
        row = {"rule": case.rule, "budget": case.share, "tokens": case.tokens, "prompts": case.prompts}
        rules = page_rules(case.tokens, case.share) if case.table == "pages" else token_rules(case.share)
        return row | grade(llm, rules.get(case.rule), samples[case.tokens])

    return measure


def grade(llm, rule, samples: list) -> dict:
    """`rule`: a Selection, of the project or of this benchmark; None: everything is read"""
    from benchmarks.lib import internals
    from benchmarks.suites.selection_rules import attention_mass, canvases
    from vllm_dlm.options import server_options

    options = server_options({"reuse": {"name": "fast_dllm"}}, "low_confidence")
    options = options if rule is None else replace(options, selection=rule)
    internals.set_server_options(llm, options)
    torch.manual_seed(0)  # the random rule draws from torch's generator
    measured = internals.AttentionKept(canvases, attention_mass).measured()
    with internals.registered("selection", options.selection), measured as kept:
        right = exact_match(llm, samples)
    if not kept.prompt:
        return {"exact_match": right, "kept": 1.0}
    mass = {"mass": float(kept.kept / kept.total), "of_oracle": float(kept.kept / kept.best)}
    return {"exact_match": right, "kept": kept.read / kept.prompt} | mass


def finished(rows: list[dict]) -> list[dict]:
    dense = {row["tokens"]: row["exact_match"] for row in rows if row.get("rule") == "dense"}
    for row in rows:
        if row.get("tokens") in dense:
            row["vs_dense"] = 100 * (row["exact_match"] - dense[row["tokens"]])
    return rows


def plot(figure, rows: list[dict]) -> None:
    rows = [row for row in rows if "exact_match" in row]
    several = len({row["budget"] for row in rows if row["rule"] != "dense"}) > 1
    (plot_budgets if several else plot_rules)(figure, rows)


def plot_budgets(figure, rows: list[dict]) -> None:
    """Exact match by the share of the prompt that is kept, a panel per prompt length"""
    lengths = sorted({row["tokens"] for row in rows})
    grid = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, tokens in zip(grid, lengths, strict=True):
        own = [row for row in rows if row["tokens"] == tokens]
        for rule in dict.fromkeys(row["rule"] for row in own):
            points = sorted((row["budget"], row["exact_match"]) for row in own if row["rule"] == rule)
            if rule == "dense":
                axes.axhline(points[0][1], color=plots.GREY, lw=0.8, label="everything")
            else:
                style = {"color": plots.colour(rule), "label": rule, "ms": 4, "lw": 1.2, "alpha": 0.85}
                axes.plot(*zip(*points, strict=True), "o-", **style)
        shares = sorted({row["budget"] for row in own if row["rule"] != "dense"})
        axes.set(xscale="log", xlabel=f"of {tokens:,} tokens", ylim=(-0.03, 1.03))
        axes.set_xticks(shares, [f"{100 * share:.3g}%" for share in shares], fontsize=7)
        axes.minorticks_off()
    grid[0].set_ylabel("exact match, by the share of the prompt that is kept")
    plots.legend(figure, grid[0])


def plot_rules(figure, rows: list[dict]) -> None:
    """Answers, and attention kept, of each rule at one budget"""
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["rule"] for row in rows]
    plots.dots(left, names, [row["exact_match"] for row in rows], "exact match", "{:.1%}")
    kept = [row.get("of_oracle") for row in rows]
    plots.dots(right, names, kept, "attention kept, of what as many tokens could", "{:.1%}")
