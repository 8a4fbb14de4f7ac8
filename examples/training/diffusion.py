"""LLaDA's loss on the demo checkpoint, through a mask over pages: `python -m examples.training.diffusion --mask soft`.

Run the same command again to go on after an interruption. The result is a
checkpoint in the hub's form in OUTPUT/final, which a server starts as it is:
the page settings are in its config.
"""

from examples.demo import tokenizer as tok
from examples.training.lessons import HiddenAnswers
from examples.training.recipe import CHECKPOINT, Recipe
from vllm_dlm.training import configure
from vllm_dlm.training.diffusion import MaskedDiffusionCollator, MaskedDiffusionTrainer
from vllm_dlm.training.llada import load_llada, save_llada

CANVAS = 16


def train(recipe: Recipe):
    dense = recipe.mask == "dense"
    model = load_llada(CHECKPOINT, "sdpa" if dense else "unique")
    if not dense:
        configure(model, recipe.settings)
    trainer = MaskedDiffusionTrainer(
        model,
        recipe.arguments(),
        MaskedDiffusionCollator(mask=tok.MASK, end=tok.EOS, canvas=CANVAS),
        HiddenAnswers(recipe.seed, recipe.samples, recipe.length, recipe.needles),
        callbacks=recipe.callbacks,
        sees_prompts=not dense,
    )
    recipe.train(trainer)
    save_llada(model, recipe.output / "final", CHECKPOINT)
    return model


def main() -> None:
    recipe = Recipe.from_command_line(__doc__.splitlines()[0], output=Recipe.output / "diffusion")
    train(recipe)
    print(f"checkpoint in {recipe.output / 'final'}")


if __name__ == "__main__":
    main()
