"""How much of what a small budget costs does training give back? Exact match on the demo's recall task.

Starting from the demo checkpoint, three trainings of the same length, on the
same prompts: through the soft and then the hard mask, through the hard mask
alone, and dense. Then each answers fresh prompts at the budget it was trained
for, and reading everything. Finished trainings and gradings are kept in OUTPUT,
so that an interrupted run goes on; the results are benchmarks/results/recovery.*.
"""

import json
from dataclasses import asdict, replace

import torch
from tqdm import tqdm

import vllm_dlm.training as sparse
from benchmarks.lib import plots, report
from benchmarks.lib.load import Load
from benchmarks.lib.workloads import wilson
from examples.training import diffusion
from examples.training.decoding import Reader, exact_match
from examples.training.lessons import HiddenAnswers, Recall
from examples.training.recipe import CHECKPOINT, RUN, Recipe
from vllm_dlm.training.diffusion import MaskedDiffusionCollator
from vllm_dlm.training.llada import load_llada

EVALUATION_SEED = 1_000_003
PROMPTS = 400
#: share of the steps that the soft mask leaves to the hard one
HARD_SHARE = 0.5
TRAININGS = {
    "soft-hard": f"soft mask, hard for the last {HARD_SHARE:.0%}",
    "hard": "hard mask",
    "dense": "dense",
}

COLUMNS = [
    report.Column("training", "training"),
    report.Column("reads", "reads"),
    report.Column("exact_match", "exact match", "{:.1%}"),
    report.Column("interval", "95 % interval", lambda pair: "{:.1%}–{:.1%}".format(*pair)),
    report.Column("recovered", "of the loss recovered", "{:.0%}"),
    report.Column("pages_under_threshold", "pages under threshold", "{:.1%}"),
    report.Column("dense_weight_under_threshold", "weight there without a mask", "{:.1%}"),
    report.Column("masked_weight_under_threshold", "through the soft mask", "{:.1%}"),
]
STATED = {
    "shapes": "demo checkpoint (vllm_dlm/demo/checkpoint), canvas of 16, blocks of 8",
    "dtype": "float32",
    "baseline": "the untrained checkpoint at the same budget, and dense training of the same length",
    "counted": f"whole answers, of {PROMPTS} fresh prompts",
    "prompts": PROMPTS,
}
NOTES = [
    "Exact match of the whole answer, end token included, greedy, canvas of 16, blocks of 8, one token per step; the "
    "prompt's keys are recomputed at the start of each block, pages are chosen anew in every step.",
    "reads: the prompt's pages a query of the response may read, in every layer; the response is always read.",
    "of the loss recovered: (exact match - untrained at the budget) / (untrained, reading everything - untrained at "
    "the budget).",
    "pages under threshold: of the pages seen, those whose score lies below the query's threshold. weight there: share "
    "of attention that they would get if nothing were masked, and that gets through the mask at the last temperature "
    "of training (soft mask) or at its first (the others); over prompts and noise as in training.",
]


def main() -> None:
    recipe = Recipe.from_command_line(
        __doc__.splitlines()[0],
        output=Recipe.output / "recovery",
        steps=400,
        learning_rate=1e-3,
        # With a threshold that stands still in the backward pass every score is pushed up, to no effect but the drift:
        # the loss of the soft mask rises above that of the hard one. Differences of scores have no such way out.
        moving_threshold=True,
    )
    folders = {"untrained": CHECKPOINT}
    for name in TRAININGS:
        own = replace(recipe, mask=name, output=recipe.output / name)
        if name == "soft-hard":
            own = replace(own, mask="soft", hard_share=HARD_SHARE)
        own.claim()
        folders[name] = own.output / "final"
        if not folders[name].exists():
            print(f"training: {name}")
            diffusion.train(own)
    result = grade(recipe, folders)
    result.print()
    for path in result.write(plot=plot):
        print(path)


def grade(recipe: Recipe, folders: dict) -> report.Report:
    kept = recipe.output / "graded.json"
    settings = {name: value for name, value in asdict(recipe).items() if name not in RUN | {"mask", "hard_share"}}
    done = json.loads(kept.read_text()) if kept.exists() and not recipe.fresh else {}
    done = done.get("rows", {}) if done.get("settings") == settings else {}
    data = Recall(EVALUATION_SEED, PROMPTS, recipe.length, recipe.needles)
    samples = [data.sample(index) for index in range(PROMPTS)]
    conditions = [(name, dense) for dense in (False, True) for name in folders]
    with tqdm(total=len(conditions) * PROMPTS, unit="prompt") as progress:
        for name, dense in conditions:
            key = f"{name}, {'dense' if dense else 'sparse'}"
            progress.set_postfix_str(key)
            if key in done:
                progress.update(PROMPTS)
                continue
            model = load_llada(folders[name], "sdpa" if dense else "unique")
            if not dense:  # whatever mask it was trained on
                sparse.configure(model, recipe.settings)
            right = exact_match(Reader(model, dense), samples, diffusion.CANVAS, "block", progress)
            done[key] = {"right": sum(right), "n": PROMPTS} | ({} if dense else shares(model, recipe, name))
            recipe.output.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"settings": settings, "rows": done}))
    return report.Report(
        "recovery",
        "Accuracy at a small page budget, before and after training",
        STATED | settings | report.surroundings(recipe.threads, Load(timed=False)),
        COLUMNS,
        NOTES,
        rows_of(done, recipe),
    )


def shares(model, recipe: Recipe, name: str, rows: int = 32) -> dict:
    """How far the mask binds on fresh prompts, hidden as in training."""
    sparse.configure(
        model, replace(recipe.settings, hard=False, temperature=recipe.end if name == "soft-hard" else recipe.start)
    )
    data = HiddenAnswers(EVALUATION_SEED + 1, rows, recipe.length, recipe.needles)
    collate = MaskedDiffusionCollator(mask=diffusion.tok.MASK, end=diffusion.tok.EOS, canvas=diffusion.CANVAS)
    model.train()
    with torch.no_grad(), sparse.binding() as counted:
        for start in range(0, rows, 8):
            batch = collate([data[index] for index in range(start, start + 8)])
            model(input_ids=batch["input_ids"], prompt_mask=batch["prompt_mask"])
    return counted.shares


def rows_of(done: dict, recipe: Recipe) -> list[dict]:
    pages = recipe.length // recipe.page_size
    budget = f"{recipe.budget_tokens // recipe.page_size} of {pages} pages"
    exact = {key: row["right"] / row["n"] for key, row in done.items()}
    low, high = exact["untrained, sparse"], exact["untrained, dense"]
    rows = []
    for key, row in done.items():
        name, reads = key.split(", ")
        rows.append(
            {
                "training": TRAININGS.get(name, "none"),
                "reads": budget if reads == "sparse" else "everything",
                "exact_match": exact[key],
            }
            | {"interval": wilson(row["right"], row["n"])}
            | {"recovered": (exact[key] - low) / (high - low) if reads == "sparse" and name != "untrained" else None}
            | {name: value for name, value in row.items() if name not in ("right", "n")}
        )
    return rows


def plot(figure, rows: list[dict]) -> None:
    """With Wilson's intervals, for those that read the budget and those that read everything."""
    left, right = figure.subplots(1, 2, sharey=True, sharex=True)
    whole = [row for row in rows if row["reads"] == "everything"]
    for axes, own in ((left, [row for row in rows if row not in whole]), (right, whole)):
        names = ["untrained" if row["training"] == "none" else row["training"] for row in own]
        plots.dots(
            axes,
            names,
            [row["exact_match"] for row in own],
            f"exact match, reading {own[0]['reads']}",
            "{:.1%}",
            spread=[row["interval"] for row in own],
        )


if __name__ == "__main__":
    main()
