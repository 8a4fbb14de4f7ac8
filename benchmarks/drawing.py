"""Plots of results: readable at a README's width, one colour per method wherever it appears."""

import textwrap
from collections.abc import Callable
from pathlib import Path

#: of Okabe and Ito, which readers of all kinds of colour vision tell apart
BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#C8B400", "#777777",
)  # fmt: skip
#: the longest beginning that fits a label decides
COLOURS = {
    "loop": "#444444", "none": GREY, "dense": GREY, "fast_dllm": ORANGE, "dllm_cache": GREEN, "dyllm": BLUE,
    "fast_dllm/dual+wavefilter": SKY, "fast_dllm/dual+wavefilter/paper": BLUE, "fast_dllm/dual+unique": PINK,
    "unique": PINK, "unique, dense_layers []": RED, "unique, vector": RED, "unique, all rows": YELLOW,
    "wavefilter/serve": SKY, "wavefilter/serve, every step": GREEN, "wavefilter/paper": BLUE,
    "mean only": ORANGE, "quest": GREEN, "block mean": ORANGE, "block mean + spread": RED, "sparse-dllm": PINK,
    "oracle": "#444444", "random": GREY,
}  # fmt: skip


def colour(label: str) -> str:
    fitting = [name for name in COLOURS if label.startswith(name)]
    return COLOURS[max(fitting, key=len)] if fitting else BLUE


def save(path: Path, title: str, caption: str, draw: Callable) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 5), layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("\n".join(textwrap.wrap(caption, 165)), fontsize=6.5, color="#555555", x=0.01, ha="left")
    # Without the version of matplotlib in it the same figures give the same file.
    figure.savefig(path, dpi=140, metadata={"Software": None})
    pyplot.close(figure)


def bars(axes, groups: dict[str, dict[str, float]], ylabel: str, form: str = "{:.3g}", log: bool = False) -> None:
    """groups: label under the axis -> series -> height. Categories, so no lines; legend above the bars."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.84 / len(series)
    # as large as the widest number may be beside its neighbours
    size = max(5.0, min(8.5, 330 / (len(groups) * len(series))))
    for i, name in enumerate(series):
        here = [(j, group[name]) for j, group in enumerate(groups.values()) if group.get(name) is not None]
        at = [j + (i - (len(series) - 1) / 2) * width for j, _ in here]
        drawn = axes.bar(at, [height for _, height in here], 0.92 * width, label=name, color=colour(name))
        axes.bar_label(drawn, [form.format(height) for _, height in here], fontsize=size, padding=1)
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.set_ylabel(ylabel)
    if log:
        axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.legend(frameon=False, fontsize=8, ncols=min(len(series), 4), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def dots(axes, names: list[str], values: list[float], xlabel: str, spread: list | None = None, form: str = "{:.1%}") -> None:
    """A dot per name, names down the side, where no two can meet; `spread` has (low, high) or None of each."""
    places = range(len(names))[::-1]
    for y, name, value, ends in zip(places, names, values, spread or [None] * len(names), strict=True):
        if ends:
            axes.plot(ends, [y, y], color=colour(name), lw=2, alpha=0.5, solid_capstyle="butt")
        axes.plot([value], [y], "o", color=colour(name), ms=6)
        axes.annotate(form.format(value), (value, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(-0.6, len(names) - 0.2)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
