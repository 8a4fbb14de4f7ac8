"""What selections of cached prompt keys keep: answers and attention mass, on the demo checkpoint, at equal budgets.

Several needles are hidden in a prompt and some are asked for. The prompt is
cached (Fast-dLLM, dual); every later step reads only what the rule chose.
Other rules stand beside the project's: Quest's minimum and maximum of a page,
means alone, Sparse-dLLM's, the tokens of most attention (which nobody knows
without reading all of them), and chance.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import drawing, report
from benchmarks.load import Load
from benchmarks.quality import BLOCK, CANVAS, Engine

PAGE = 16
COLUMNS = [
    report.Column("rule", "rule"),
    report.Column("budget", "prompt kept", "{:.2%}"),
    report.Column("tokens", "prompt tokens"),
    report.Column("prompts", "prompts"),
    report.Column("exact_match", "exact match", "{:.1%}"),
    report.Column("vs_dense", "points vs dense", "{:+.1f}"),
    report.Column("mass", "attention mass kept", "{:.1%}"),
    report.Column("of_oracle", "of the oracle's", "{:.1%}"),
    report.Column("kept", "tokens read of prompt", "{:.1%}"),
]
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


def page_rules(tokens: int, share: float) -> dict:
    from benchmarks.baselines import Quest
    from vllm_dlm.plugins.selection.unique import Unique

    common = {
        "page_size": PAGE, "budget_tokens": int(share * tokens) // PAGE * PAGE, "min_context": 0, "dense_layers": (),
        "sink_pages": 1, "recent_pages": 2,
    }  # fmt: skip
    return {
        "unique (mean + spread)": Unique(**common), "mean only": Unique(lam=0.0, **common),
        "quest (min, max)": Quest(**common),
        "unique, vector spread, lam 1": Unique(lam=1.0, std_kind="vector", **common),
        "unique, all rows choose": Unique(query_set="active", **common),
    }  # fmt: skip


def token_rules(share: float) -> dict:
    from benchmarks.baselines import Oracle, Random, SparseDLLM
    from vllm_dlm.plugins.selection.wavefilter import WaveFilter

    serve = WaveFilter(**WaveFilter.presets["serve"], min_prompt=0)
    # the paper's form: two scales, four for the smallest budget
    levels = 4 if share < 0.08 else 2
    return {
        "wavefilter/paper": WaveFilter(levels=levels, proportions=share ** (1 / levels), min_prompt=0),
        "wavefilter/serve": replace(serve, proportions=(0.6, 0.6, share / 0.36)),
        "wavefilter/serve, every step": replace(serve, proportions=(0.6, 0.6, share / 0.36), reselect="step"),
        "block mean": WaveFilter(granularity="page", levels=2, proportions=share, min_prompt=0),
        "block mean + spread": WaveFilter(
            granularity="page", levels=2, proportions=share, detail_lambda=0.5, min_prompt=0
        ),
        "sparse-dllm": SparseDLLM(share), "oracle": Oracle(share), "random": Random(share),
    }  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("--prompts", type=int, default=100, help="for each line (default 100)")
    parser.add_argument("--lengths", default="256,512,1024,2048", help="prompt tokens (default 256,512,1024,2048)")
    parser.add_argument("--budgets", default="0.25,0.16,0.09,0.0625", help="shares of the prompt that are kept")
    parser.add_argument("--needles", type=int, default=8, help="hidden in each prompt (default 8)")
    parser.add_argument("--queried", type=int, default=2, help="of them asked for (default 2)")
    parser.add_argument("--table", choices=["pages", "tokens"], help="one of the two tables only")
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="only these; dense is always there")
    parser.add_argument("--name", default="", help="appended to the names of the result files")
    parser.add_argument("--quick", action="store_true", help="a handful of prompts")
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    lengths = [256] if args.quick else [int(n) for n in args.lengths.split(",")]
    budgets = [0.25] if args.quick else [float(share) for share in args.budgets.split(",")]
    prompts = 4 if args.quick else args.prompts
    jobs = []
    for tokens in lengths:
        jobs.append((tokens, 1.0, "dense", None, "both"))
        if args.table != "pages":
            jobs += [
                (tokens, share, name, rule, "tokens") for share in budgets for name, rule in token_rules(share).items()
            ]
        if args.table != "tokens" and (
            tokens >= 512 or args.quick
        ):  # below, the pages that are always read fill the budget
            jobs += [
                (tokens, share, name, rule, "pages")
                for share in budgets[:2]
                for name, rule in page_rules(tokens, share).items()
            ]
    if args.rules:
        known, wanted = {name for _, _, name, _, _ in jobs}, set(args.rules)
        if wanted - known:
            raise SystemExit(f"--rules: unknown {'; '.join(sorted(wanted - known))}; known: {'; '.join(sorted(known))}")
        jobs = [job for job in jobs if job[2] in wanted | {"dense"}]
    load = Load(timed=False)
    engine = SelectionEngine(max(lengths) + 64)
    rows, samples = [], {tokens: questions(prompts, tokens, args.needles, args.queried) for tokens in lengths}
    with tqdm(total=len(jobs) * prompts, desc="selection", unit="prompt") as progress:
        for tokens, share, name, rule, table in jobs:
            progress.set_postfix_str(f"{name}, {share:.2%} of {tokens}")
            row = {"rule": name, "budget": share, "tokens": tokens, "prompts": prompts, "table": table}
            row |= engine.grade(rule, samples[tokens], progress)
            rows.append(row)
    dense = {row["tokens"]: row["exact_match"] for row in rows if row["rule"] == "dense"}
    for row in rows:
        row["vs_dense"] = 100 * (row["exact_match"] - dense[row["tokens"]])
    suffix = ("" if args.needles == 8 else f"-{args.needles}-needles") + args.name
    for table, title in (
        ("pages", "Pages of the prompt by what rule"),
        ("tokens", "Tokens of the prompt by what rule"),
    ):
        if args.table not in (None, table):
            continue
        result = report.Report(
            name=f"selection-{table}{suffix}",
            title=title,
            settings=settings(table, args) | report.surroundings(torch.get_num_threads(), load),
            columns=COLUMNS, notes=NOTES, rows=[row for row in rows if row["table"] in (table, "both")],
        )  # fmt: skip
        result.print()
        for path in result.write(args.results, plot):
            print(path)


def settings(table: str, args) -> dict:
    asked = f"{args.needles} needle{'s' * (args.needles > 1)} in a prompt, {args.queried} asked for"
    return {
        "shapes": f"demo checkpoint, canvas of {CANVAS}, blocks of {BLOCK}, {asked}", "dtype": "float32",
        "baseline": "fast_dllm (dual) that reads all cached keys (dense)",
        "counted": "whole answers, and attention weight of masked rows on what is kept",
        "page": PAGE if table == "pages" else None, "needles": args.needles, "asked for": args.queried,
    }  # fmt: skip


def questions(count: int, tokens: int, needles: int = 8, queried: int = 2):
    from examples.demo import tasks

    rng, filler = np.random.default_rng(47), tasks.Filler(11)
    return [tasks.recall(rng, filler, tokens, needles=needles, queried=queried) for _ in range(count)]


class SelectionEngine(Engine):
    def options(self, rule):
        """`rule` is a Selection, of the project or of this benchmark."""
        from vllm_dlm.options import server_options

        plain = server_options({"reuse": {"name": "fast_dllm"}}, "low_confidence")
        return plain if rule is None else replace(plain, selection=rule)

    def grade(self, rule, samples, progress) -> dict:
        from benchmarks.baselines import attention_mass, canvases
        from vllm_dlm.engine.selecting import Selecting

        kept, oracle, total = torch.zeros(3, dtype=torch.float64)
        read, prompt = 0, 0
        shown = Selecting.shown

        def weighed(group, layer, blocks, q, rows, voters, scale, counts):
            """What would have been attended to, beside what is."""
            nonlocal kept, oracle, total, read, prompt
            found = shown(group, layer, blocks, q, rows, voters, scale, counts)
            asked = canvases(group.asked(layer, blocks, q, rows, voters, scale))
            for view, own_units, own_asked in zip(group.views, group.units(found), asked, strict=True):
                weight = attention_mass(own_asked)[:, : view.prompt_len].double()
                unit = torch.arange(view.prompt_len) // view.selection.unit
                seen = torch.stack([torch.isin(unit, own) for own in own_units])
                total += weight.sum()
                kept += weight[seen].sum()
                for own, mask in zip(weight, seen, strict=True):
                    oracle += own.topk(int(mask.sum()))[0].sum()
                read, prompt = read + int(seen.sum()), prompt + seen.numel()
            return found

        Selecting.shown = weighed
        try:
            right = self.exact_match_of(rule, samples, progress)
        finally:
            Selecting.shown = shown
        if not prompt:
            return {"exact_match": right, "kept": 1.0}
        return {
            "exact_match": right, "mass": float(kept / total), "of_oracle": float(kept / oracle), "kept": read / prompt,
        }  # fmt: skip

    def exact_match_of(self, rule, samples, progress) -> float:
        right = 0
        for start in range(0, len(samples), 16):
            part = samples[start : start + 16]
            answers = self.generate(rule, part)
            right += sum(got == sample.answer_ids for got, sample in zip(answers, part, strict=True))
            progress.update(len(part))
        return right / len(samples)


def plot(figure, rows: list[dict]) -> None:
    if len({row["budget"] for row in rows if row["rule"] != "dense"}) > 1:
        plot_budgets(figure, rows)
    else:
        plot_rules(figure, rows)


def plot_budgets(figure, rows: list[dict]) -> None:
    """Exact match by the share of the prompt that is kept, a picture per prompt length."""
    lengths = sorted({row["tokens"] for row in rows})
    grid = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, tokens in zip(grid, lengths, strict=True):
        own = [row for row in rows if row["tokens"] == tokens]
        for rule in dict.fromkeys(row["rule"] for row in own):
            points = sorted((row["budget"], row["exact_match"]) for row in own if row["rule"] == rule)
            if rule == "dense":
                axes.axhline(points[0][1], color=drawing.GREY, lw=0.8, label="everything")
            else:
                axes.plot(
                    *zip(*points, strict=True), "o-", color=drawing.colour(rule), label=rule, ms=4, lw=1.2, alpha=0.85
                )
        shares = sorted({row["budget"] for row in own if row["rule"] != "dense"})
        axes.set(xscale="log", xlabel=f"of {tokens:,} tokens", ylim=(-0.03, 1.03))
        axes.set_xticks(shares, [f"{100 * share:.3g}%" for share in shares], fontsize=7)
        axes.minorticks_off()
    grid[0].set_ylabel("exact match, by the share of the prompt that is kept")
    drawing.legend(figure, grid[0])


def plot_rules(figure, rows: list[dict]) -> None:
    """At one budget: answers, and attention kept, of each rule."""
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["rule"] for row in rows]
    drawing.dots(left, names, [row["exact_match"] for row in rows], "exact match", "{:.1%}")
    drawing.dots(
        right, names, [row.get("of_oracle") for row in rows], "attention kept, of what as many tokens could", "{:.1%}"
    )
