"""Pictures of methods: rows that reuse recomputes, keys that a selection reads, pages of a step, the soft mask."""

import numpy as np

from benchmarks.lib.plots import BLUE, GREEN, GREY, ORANGE, RED, SKY
from docs.pictures.cells import INK, bare, grid, legend, strip

ABSENT, CARRIED, RECOMPUTED = range(3)
PROMPT_LEN, RESPONSE, BLOCK = 12, 16, 8
#: intervals as short as the picture
POLICIES = [
    {"name": "none"},
    {"name": "fast_dllm", "cache": "dual"},
    {"name": "dllm_cache", "prompt_interval": 8, "response_interval": 4},
    {"name": "dyllm", "whole_interval": 8},
]


def reuse(figure) -> None:
    """The plans of the policies for one canvas, one token per step from the left."""
    for axes, given in zip(figure.subplots(1, len(POLICIES)), POLICIES, strict=True):
        states, filled = planned(given)
        grid(axes, states, ("#eeeeee", SKY, BLUE))
        axes.plot([position for _, position in filled], [step for step, _ in filled], "o", color=ORANGE, ms=3)
        for end, style in ((PROMPT_LEN, "-"), (PROMPT_LEN + BLOCK, ":")):
            axes.vlines(end - 0.5, -0.5, len(states) - 0.5, color=INK, lw=1, ls=style)
        fields = ", ".join(f"{field} {value}" for field, value in given.items() if field != "name")
        axes.set_title(given["name"], fontsize=10, fontweight="bold", pad=16)
        axes.text(0.5, 1.02, fields.replace("_", " "), fontsize=6.5, ha="center", transform=axes.transAxes)
        axes.text(PROMPT_LEN / 2 - 0.5, len(states), "prompt", fontsize=8, ha="center", va="center")
        axes.text(PROMPT_LEN + RESPONSE / 2 - 0.5, len(states), "response", fontsize=8, ha="center", va="center")
        axes.set_ylim(len(states) + 0.5, -0.5)
    figure.axes[0].set_ylabel("steps, downwards", fontsize=8)
    legend(
        figure,
        {
            BLUE: "recomputed in every layer",
            SKY: "live: the layer's flow decides",
            "#dddddd": "comes from the cache",
            ORANGE: "filled in this step",
        },
    )


def planned(given: dict) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """-> what each step does with each row [steps, N], and (step, position) of what it fills"""
    from vllm_dlm.canvas.canvas import Canvas, Commit
    from vllm_dlm.options import server_options

    options = server_options({"decoding": {"block_length": BLOCK}, "reuse": given}, "low_confidence")
    canvas = Canvas(options, mask_id=-1, shift=0, prompt=[1] * PROMPT_LEN, length=PROMPT_LEN + RESPONSE)
    states, filled = np.full((RESPONSE, len(canvas)), ABSENT), []
    for step in range(RESPONSE):
        states[step, canvas.plan.live] = CARRIED
        states[step, canvas.plan.forced] = RECOMPUTED
        if canvas.plan.force_changed:
            states[step, canvas.changed] = np.where(states[step, canvas.changed] == ABSENT, ABSENT, RECOMPUTED)
        read = canvas.candidates()
        canvas.apply(Commit(read, np.ones(len(read)), np.array([0]), np.array([1])))
        filled.append((step, int(read[0])))
        if len(read) == 1:
            canvas.hand_out(canvas.block_width)
    return states, filled


def selection(figure) -> None:
    """Scores are random: what stays of them is counted as the methods count."""
    left, right = figure.subplots(1, 2)
    rng = np.random.default_rng(3)
    pages_per_head(left, rng)
    descent(right, rng)
    legend(figure, {ORANGE: "kept", BLUE: "always kept", "#dddddd": "left out", SKY: "the response: always read"})


def pages_per_head(axes, rng, pages: int = 20, budget: int = 6) -> None:
    colours = ("#dddddd", ORANGE, BLUE, SKY)
    for head in range(3):
        score = rng.normal(size=pages)
        score[[0, -1]] = np.inf  # a sink page, and the prompt's end
        best = np.argsort(-score)[:budget]
        states = [2 if np.isinf(score[page]) else int(page in best) for page in range(pages)]
        strip(axes, -head, [*states, 3, 3, 3], colours)
        axes.text(-0.4, -head, f"key head {head}", fontsize=8, ha="right", va="center")
    axes.set_title("unique: pages, by mean and spread of their keys", fontsize=9.5, loc="left")
    axes.text(pages / 2, -2.75, "pages of the prompt", fontsize=8, ha="center")
    bare(axes)
    axes.set_xlim(-5, pages + 3.2)
    axes.set_ylim(-3, 0.8)


def descent(axes, rng, runs: int = 16) -> None:
    colours = ("#dddddd", ORANGE, BLUE, "white")
    alive, tokens = np.arange(runs), 4 * runs
    for row, (size, kept, text) in enumerate([(4, 8, "runs of 4"), (2, 8, "pairs"), (1, 10, "tokens")]):
        best = np.sort(rng.permutation(alive)[:kept])
        states = [1 if i in best else 0 if i in alive else 3 for i in range(tokens // size)]
        strip(axes, -row, states, colours, width=size)
        axes.text(-1, -row, text, fontsize=8, ha="right", va="center")
        alive = (2 * best[:, None] + np.arange(2)).flatten()
    axes.set_title("wavefilter: finer looks at what a coarser one left", fontsize=9.5, loc="left")
    axes.text(tokens / 2, -2.75, "tokens of the prompt", fontsize=8, ha="center")
    bare(axes)
    axes.set_xlim(-13, tokens + 1)
    axes.set_ylim(-3, 0.8)


def page_sparse(figure) -> None:
    """Three requests of one step."""
    axes = figure.subplots()
    rng = np.random.default_rng(11)
    rows = [("part of a prompt: everything", 22, None), ("a generated position, short: everything", 5, None)]
    rows += [(f"a generated position, long: key head {head}", 34, 8) for head in range(2)]
    for row, (text, pages, budget) in enumerate(rows):
        states = np.ones(pages, dtype=int)
        if budget is not None:
            states[:] = 0
            states[1 + rng.permutation(pages - 3)[: budget - 3]] = 1
            states[[0, -2, -1]] = 2
        strip(axes, -row, states, ("#dddddd", ORANGE, BLUE))
        axes.text(-0.5, -row, text, fontsize=8, ha="right", va="center")
    axes.annotate("", (34.2, -3.75), (0, -3.75), arrowprops={"arrowstyle": "->", "color": INK, "lw": 0.8})
    axes.text(17, -4.15, "pages of each request's KV cache", fontsize=8, ha="center", va="center")
    bare(axes)
    axes.set_xlim(-17, 35)
    axes.set_ylim(-4.5, 0.6)
    legend(figure, {ORANGE: "read", BLUE: "always read: sink and recent pages", "#dddddd": "left out"})


def gate(figure) -> None:
    """How far a page is open in training, by its score."""
    axes = figure.subplots()
    distance = np.linspace(-3, 3, 601)
    for temperature, colour in ((1.0, BLUE), (0.3, GREEN), (0.1, ORANGE)):
        axes.plot(distance, 1 / (1 + np.exp(-distance / temperature)), color=colour, label=f"temperature {temperature}")
    axes.plot([-3, 0, 0, 3], [0, 0, 1, 1], color=RED, ls="--", label="hard: serving")
    axes.axvline(0, color=GREY, lw=0.6)
    axes.set_xlabel("score minus threshold, in units of a logit", fontsize=9)
    axes.set_ylabel("share of the page that is open", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
