"""The README's picture: a canvas that is filled, and a new token that reads some pages."""

import numpy as np

from benchmarks.lib.plots import BLUE, GREY, ORANGE
from docs.pictures.cells import INK, bare, grid, strip

PROMPT, MASK, NEW, OLD = range(4)
COLOURS = ("#b9b9b9", "#ececec", ORANGE, BLUE)
#: which positions of the response each step fills, in canvas blocks of six
FILLED = [(0, 3), (1,), (2, 5), (4,), (6, 7, 11), (8, 10), (9,)]
PROMPT_LEN, RESPONSE = 6, 12


def draw(figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.08])
    canvas(left)
    pages(right)


def canvas(axes) -> None:
    states = np.full((len(FILLED) + 1, PROMPT_LEN + RESPONSE), MASK)
    states[:, :PROMPT_LEN] = PROMPT
    for step, positions in enumerate(FILLED):
        for position in positions:
            states[step + 1, PROMPT_LEN + position] = NEW
            states[step + 2 :, PROMPT_LEN + position] = OLD
    grid(axes, states, COLOURS)
    axes.set_title("Diffusion serving: a canvas is filled in any order", fontsize=10, loc="left")
    axes.set_yticks(range(len(states)), ["start", *(f"step {i + 1}" for i in range(len(FILLED)))], fontsize=8)
    axes.tick_params(length=0)
    ends = PROMPT_LEN - 0.5, PROMPT_LEN + RESPONSE / 2 - 0.5, PROMPT_LEN + RESPONSE - 0.5
    axes.vlines(ends[:2], -0.5, len(states) - 0.5, color=INK, lw=1)
    for start, end, text in zip((-0.5, *ends[:2]), ends, ("prompt", "canvas block 0", "canvas block 1"), strict=True):
        axes.text((start + end) / 2, len(states) - 0.35, text, fontsize=8, ha="center", va="top")
    for x, colour, text in (
        (0, "#cfcfcf", "mask"),
        (4.7, ORANGE, "filled in this step"),
        (12.4, BLUE, "filled before"),
    ):
        axes.text(x, len(states) + 0.75, "■ ", color=colour, fontsize=9, ha="right", va="center")
        axes.text(x, len(states) + 0.75, text, fontsize=8, va="center")
    axes.set_ylim(len(states) + 1.2, -0.6)


def pages(axes) -> None:
    """Scores as UNIQUE has them, of random keys."""
    rng = np.random.default_rng(5)
    count, size, width, budget = 24, 64, 32, 7
    keys = rng.normal(size=(2, count, size, width)) + 0.35 * rng.normal(size=(2, count, 1, width))
    query = rng.normal(size=(2, 1, width))
    mean, spread = keys.mean(2), np.sqrt(keys.var(2).sum(-1))
    score = ((query * mean).sum(-1) + 0.5 * np.linalg.norm(query, axis=-1) * spread) / np.sqrt(width)
    for head in range(2):
        forced = np.isin(np.arange(count), [0, count - 2, count - 1])
        best = np.argsort(-np.where(forced, np.inf, score[head]))[:budget]
        states = [2 if page in best and forced[page] else int(page in best) for page in range(count)]
        base = 2.9 * (1 - head)
        strip(axes, base, states, ("#dddddd", ORANGE, BLUE), height=0.5)
        low, high = score[head].min(), score[head].max()
        for page in range(count):
            height = 0.15 + 1.35 * (score[head][page] - low) / (high - low)
            colour = (GREY, ORANGE, BLUE)[states[page]]
            axes.bar(page + 0.5, height, 0.5, base + 0.4, color=colour, alpha=0.55)
        axes.text(-0.4, base, f"key head {head}", fontsize=8, ha="right", va="center")
        axes.text(-0.4, base + 1.1, "promise", fontsize=8, ha="right", va="center", color="#666666")
    axes.annotate("", (count + 0.1, -0.62), (0, -0.62), arrowprops={"arrowstyle": "->", "color": INK, "lw": 0.8})
    axes.text(count / 2, -0.75, "pages of the KV cache, oldest first", fontsize=8, ha="center", va="top")
    for x, colour, text in ((0.6, ORANGE, "chosen"), (6.4, BLUE, "always read"), (14.6, "#cccccc", "left out")):
        axes.text(x, -1.72, "■ ", color=colour, fontsize=9, ha="right", va="center")
        axes.text(x, -1.72, text, fontsize=8, va="center")
    bare(axes)
    axes.set_xlim(-4.4, count + 0.3)
    axes.set_ylim(-2.1, 5.0)
    axes.set_title("Page-sparse decoding: a new token reads a few pages", fontsize=10, loc="left")
