"""Plots of results: readable at the width of a README, one colour per method in all of them."""

import textwrap
from collections.abc import Callable
from pathlib import Path

#: Okabe and Ito's palette, which is readable with any kind of colour vision
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, YELLOW, GREY = "#56B4E9", "#CC79A7", "#C8B400", "#777777"
#: colour -> beginnings of labels; the longest beginning that fits decides
LABELS = {
    "#444444": "loop; oracle; exact best; dense, SDPA",
    GREY: "none; dense; by bytes alone",
    ORANGE: "fast_dllm; mean only; block mean; hard mask",
    GREEN: "dllm_cache; wavefilter/serve, every step; quest",
    BLUE: "dyllm; fast_dllm/dual+wavefilter/paper; wavefilter/paper; soft mask",
    SKY: "fast_dllm/dual+wavefilter; wavefilter/serve; torch's kernels; soft mask, gradient",
    PINK: "fast_dllm/dual+unique; score, select and attend; unique; sparse-dllm; vLLM's kernel attends; dense, eager",
    YELLOW: "fast_dllm/prefix; unique, all rows",
    RED: "fast_dllm/dual, eager; unique, dense_layers []; unique, vector; block mean + spread; dense, SDPA with",
    "#7B3294": "second_look",
    "#BBBBBB": "random; recent only",
    "#AAAAAA": "dense, SDPA, gradient",
}
COLOURS = {label: colour for colour, labels in LABELS.items() for label in labels.split("; ")}


def colour(label: str) -> str:
    fitting = [name for name in COLOURS if label.startswith(name)]
    return COLOURS[max(fitting, key=len)] if fitting else BLUE


def picture(title: str, caption: str, draw: Callable):
    """The figure that `draw(figure)` draws, with a title and a caption below."""
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
    # Without matplotlib's version, equal figures give equal files.
    figure.savefig(path, dpi=140, metadata={"Software": None})
    pyplot.close(figure)


def bars(axes, groups: dict[str, dict[str, float]], ylabel: str, form: str = "{:.3g}", log: bool = False) -> None:
    """Bars in groups: label under the axis -> series -> height, with a legend above."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.84 / len(series)
    # as large as fits next to the neighbours
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


def dots(axes, names: list[str], values: list, xlabel: str, form: str, log=False, spread: list | None = None) -> None:
    """A dot per name, with the names on the y axis. `spread`: (low, high) of each. On a logarithmic axis a zero is
    written at the edge."""
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
        offset, (across, up) = ((0, 6), ("center", "bottom")) if ends else ((6, 0), ("left", "center"))
        style = {"xytext": offset, "textcoords": "offset points", "ha": across, "va": up, "fontsize": 7}
        axes.annotate(form.format(value), (value, y), **style)
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
    """One legend for all panels, at their right."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
