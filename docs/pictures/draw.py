"""The pictures of the documentation: `python -m docs.pictures.draw` writes them anew beside this file.

What they show of plans, budgets and gates is computed, by the policies themselves where that needs no model.
"""

from collections.abc import Callable
from pathlib import Path

from docs.pictures import methods, products, step

FOLDER = Path(__file__).parent
#: name of the file -> (width and height in inches, what draws it)
PICTURES: dict[str, tuple[tuple[float, float], Callable]] = {
    "products": ((9, 3.7), products.draw),
    "step": ((9, 5.6), step.draw),
    "reuse": ((9, 3.9), methods.reuse),
    "selection": ((9, 3.3), methods.selection),
    "page_sparse": ((9, 2.9), methods.page_sparse),
    "gate": ((9, 2.9), methods.gate),
}


def picture(name: str):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size, draw = PICTURES[name]
    figure = pyplot.figure(figsize=size, layout="constrained", facecolor="white")
    draw(figure)
    return figure


def main() -> None:
    from matplotlib import pyplot, rc_context

    # Letters as outlines: widths do not depend on a reader's fonts. Nothing in the file depends on the day.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "vllm_dlm"}):
        for name in PICTURES:
            figure = picture(name)
            figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})
            pyplot.close(figure)


if __name__ == "__main__":
    main()
