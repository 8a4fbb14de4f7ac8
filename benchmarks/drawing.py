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
    "score, select and attend": PINK, "fast_dllm/prefix": YELLOW, "fast_dllm/dual, eager": RED,
    "unique": PINK, "unique, dense_layers []": RED, "unique, vector": RED, "unique, all rows": YELLOW,
    "wavefilter/serve": SKY, "wavefilter/serve, every step": GREEN, "wavefilter/paper": BLUE,
    "mean only": ORANGE, "quest": GREEN, "block mean": ORANGE, "block mean + spread": RED, "sparse-dllm": PINK,
    "oracle": "#444444", "random": "#BBBBBB",
    "torch's kernels": SKY, "vLLM's kernel attends": PINK, "by bytes alone": GREY,
    "soft mask": BLUE, "hard mask": ORANGE, "soft mask, gradient": SKY, "dense, SDPA": "#444444",
    "dense, SDPA with": RED, "dense, eager": PINK, "dense, SDPA, gradient": "#AAAAAA",
}  # fmt: skip


def colour(label: str) -> str:
    fitting = [name for name in COLOURS if label.startswith(name)]
    return COLOURS[max(fitting, key=len)] if fitting else BLUE


def picture(title: str, caption: str, draw: Callable):
    """The figure as `draw(figure)` draws it, with its title and, below, what its numbers are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 5), layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(textwrap.wrap(title, 95)), fontsize=12)
    figure.supxlabel("\n".join(textwrap.wrap(caption, 172)), fontsize=6.5, color="#555555", x=0.01, ha="left")
    return figure


def save(path: Path, title: str, caption: str, draw: Callable) -> None:
    from matplotlib import pyplot

    figure = picture(title, caption, draw)
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


def dots(
    axes,
    names: list[str],
    values: list,
    xlabel: str,
    form: str,
    log: bool = False,
    spread: list | None = None,
) -> None:
    """A dot per name, names down the side, where no two can meet; `spread`: (low, high) of each. A zero, which has
    no logarithm, stands as a number at the edge."""
    places = range(len(names))[::-1]
    if log:
        axes.set_xscale("log")
    for y, name, value, ends in zip(places, names, values, spread or [None] * len(names), strict=True):
        if value is None:
            continue
        if log and value <= 0:
            axes.text(0.01, y, "0", transform=axes.get_yaxis_transform(), fontsize=7, va="center")
            continue
        if ends:
            axes.plot(ends, [y, y], color=colour(name), lw=5, alpha=0.3, solid_capstyle="butt")
        axes.plot([value], [y], "o", color=colour(name), ms=5)
        beside, above = ((6, 0), ("left", "center")), ((0, 6), ("center", "bottom"))
        offset, (across, up) = above if ends else beside
        axes.annotate(
            form.format(value),
            (value, y),
            xytext=offset,
            textcoords="offset points",
            ha=across,
            va=up,
            fontsize=7,
        )
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel(xlabel, fontsize=9)
    if not log:
        axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.2)
    if form.endswith("%}"):
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.grid(axis="x", color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)


def legend(figure, axes) -> None:
    """One for all panels, beside them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
