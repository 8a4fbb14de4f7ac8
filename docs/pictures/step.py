"""The picture of a step: what goes from room to room."""

from typing import NamedTuple

from benchmarks.lib.plots import BLUE, GREEN, GREY, ORANGE
from docs.pictures.cells import INK, bare


class Box(NamedTuple):
    x: float  # of the lower left corner, as y
    y: float
    width: float
    height: float
    colour: str
    file: str
    text: str


BOXES = {
    "scheduler": Box(
        0.2, 7.9, 3.9, 1.5, BLUE, "integration/scheduler",
        "canvas.plan: rows of the next step,\n"
        "as many canvases as the budget holds",
    ),
    "vllm": Box(
        10.6, 7.9, 3.3, 1.5, GREY, "vLLM",
        "stop checks, usage, streaming,\n"
        "blocks of the KV cache",
    ),
    "runner": Box(
        0.2, 5.5, 3.9, 1.5, BLUE, "step/denoiser.py",
        "the same canvas, the same plan:\n"
        "its streams, and those of features",
    ),
    "request": Box(
        10.6, 5.5, 3.3, 1.5, BLUE, "canvas/denoising.py",
        "decoding.choose → Commit,\n"
        "a finished block is handed out",
    ),
    "packing": Box(
        0.2, 3.1, 3.9, 1.5, ORANGE, "step/packing.py",
        "live rows of all canvases, no padding,\n"
        "one group per policy and kind",
    ),
    "layer": Box(
        4.9, 3.1, 4.9, 1.95, ORANGE, "step/layer.py, in each layer",
        "flows advance together, asks of one type\n"
        "are one product: Value · Query · Key,\n"
        "AttendMoved · Attend, Output · FeedForward",
    ),
    "captured": Box(
        4.9, 5.3, 4.9, 1.3, ORANGE, "step/captured.py, on a GPU",
        "small steps between refreshes: tables are\n"
        "written over, all launches replayed",
    ),
    "head": Box(
        10.6, 3.1, 3.3, 1.5, ORANGE, "step/head.py",
        "logits of the rows read, in pieces →\n"
        "token, score, probability",
    ),
    "attention": Box(
        4.9, 0.3, 4.9, 1.5, GREEN, "step/attention.py, selection.py",
        "each canvas over all its keys,\n"
        "or over those a selection chose",
    ),
    "cache": Box(
        0.2, 0.3, 3.9, 1.5, GREEN, "cache/blocks.py",
        "keys, values, features, summaries\n"
        "in the request's own KV blocks",
    ),
}  # fmt: skip
#: from where to where (box, fraction of its width, fraction of its height), what is handed over, where that stands
ARROWS = [
    (("scheduler", 0.5, 0), ("runner", 0.5, 1), "SchedulerOutput, CanvasData", (2.35, 7.55, "left")),
    (("runner", 0.5, 0), ("packing", 0.5, 1), "streams", (2.35, 5.15, "left")),
    (("packing", 1, 0.5), ("layer", 0, 0.385), "", None),
    (("layer", 1, 0.385), ("head", 0, 0.5), "", None),
    (("packing", 0.92, 1), ("captured", 0, 0.4), "", None),
    (("captured", 1, 0.4), ("head", 0.08, 1), "", None),
    (("head", 0.5, 1), ("request", 0.5, 0), "Proposal", (12.45, 5.15, "left")),
    (("request", 0.5, 1), ("vllm", 0.5, 0), "tokens", (12.45, 7.55, "left")),
    (("request", 0, 0.8), ("scheduler", 1, 0.25), "Commit: applied on both sides", (7.35, 8.05, "center")),
    (("vllm", 0, 0.7), ("scheduler", 1, 0.7), "requests that wait or run", (7.35, 9.2, "center")),
    (("layer", 0.5, 0), ("attention", 0.5, 1), "queries", (7.55, 2.55, "left")),
    (("attention", 0, 0.5), ("cache", 1, 0.5), "", None),
]


def draw(figure) -> None:
    axes = figure.subplots()
    for box in BOXES.values():
        draw_box(axes, box)
    for start, end, text, place in ARROWS:
        ways = {"arrowstyle": "->", "color": INK, "lw": 1, "shrinkA": 0, "shrinkB": 0}
        if start[0] == "attention":
            ways["arrowstyle"] = "<->"
        axes.annotate("", point(*end), point(*start), arrowprops=ways)
        if place:
            x, y, side = place
            axes.text(x, y, text, fontsize=7.5, ha=side, va="center", color="#555555", style="italic")
    for y, text, colour in ((10.1, "host: plain data, no tensors", BLUE), (-0.35, "device: packed rows", ORANGE)):
        axes.text(0.2, y, text, fontsize=8.5, color=colour, fontweight="bold", va="center")
    bare(axes)
    axes.set_xlim(0, 14.1)
    axes.set_ylim(-0.7, 10.4)


def draw_box(axes, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    round_corners = "round,pad=0,rounding_size=0.15"
    place, size = (box.x, box.y), (box.width, box.height)
    axes.add_patch(
        FancyBboxPatch(place, *size, boxstyle=round_corners, facecolor=f"{box.colour}1a", edgecolor=box.colour)
    )
    middle, top = box.x + box.width / 2, box.y + box.height
    axes.text(middle, top - 0.2, box.file, fontsize=7.5, ha="center", va="top", fontweight="bold")
    axes.text(middle, top - 0.62, box.text, fontsize=7.5, ha="center", va="top", linespacing=1.35)


def point(box: str, across: float, up: float) -> tuple[float, float]:
    found = BOXES[box]
    return found.x + across * found.width, found.y + up * found.height
