"""What the pictures share: cells in a row or a grid, and what their colours mean."""

from collections.abc import Sequence

import numpy as np

INK = "#333333"


def grid(axes, states: np.ndarray, colours: Sequence[str]) -> None:
    """states [rows, columns]: which colour each cell has; the first row is the upper one."""
    rows, columns = states.shape
    for row, own in enumerate(states):
        starts = np.flatnonzero(np.diff(own, prepend=-1))
        for start, end in zip(starts, [*starts[1:], columns], strict=True):
            axes.barh(row, end - start, 1.0, start - 0.5, color=colours[own[start]], lw=0)
    axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color="white", lw=1.2)
    axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color="white", lw=1.2)
    axes.set_xlim(-0.5, columns - 0.5)
    bare(axes)


def strip(axes, y: float, states: Sequence[int], colours: Sequence[str], width: float = 1, height: float = 0.7) -> None:
    """Cells side by side around the height y, each `width` wide."""
    for i, state in enumerate(states):
        axes.bar(i * width, height, 0.94 * width, y - height / 2, align="edge", color=colours[state], lw=0)


def bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def legend(figure, meaning: dict[str, str]) -> None:
    """colour -> what it means, in one line below the picture"""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=text) for colour, text in meaning.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
