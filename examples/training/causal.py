"""Next-token loss through a mask over pages, with transformers' Trainer as it is: `python -m examples.training.causal`.

The demo checkpoint's weights as a causal Llama: its lookup circuit works from
the left too, so that minutes of training make an autoregressive model of it.
Train with `--mask dense` first, then go on from there with the mask:

    python -m examples.training.causal --mask dense --output runs/train/causal-dense
    python -m examples.training.causal --mask soft --start-from runs/train/causal-dense/final
"""

from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, Trainer

from examples.training.lessons import NextTokens
from examples.training.recipe import CHECKPOINT, Recipe
from vllm_dlm.training import configure
from vllm_dlm.training.llada import load_llada


@dataclass
class CausalRecipe(Recipe):
    start_from: str = ""  # a folder of this recipe's; empty: the demo checkpoint


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}


def without_prompt_mask(samples: list[dict]) -> dict[str, torch.Tensor]:
    batch = collate(samples)
    batch.pop("prompt_mask")
    return batch


def start(recipe: CausalRecipe) -> LlamaForCausalLM:
    implementation = "sdpa" if recipe.mask == "dense" else "unique"
    if recipe.start_from:
        return LlamaForCausalLM.from_pretrained(recipe.start_from, attn_implementation=implementation)
    model = load_llada(CHECKPOINT, implementation)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = True
    model.config.is_causal = True
    return model


def train(recipe: CausalRecipe) -> LlamaForCausalLM:
    model = start(recipe)
    dense = recipe.mask == "dense"
    if not dense:
        configure(model, recipe.settings)
    trainer = Trainer(
        model,
        recipe.arguments(),
        without_prompt_mask if dense else collate,
        NextTokens(recipe.seed, recipe.samples, recipe.length, recipe.needles),
        callbacks=recipe.callbacks,
    )
    recipe.train(trainer)
    model.save_pretrained(recipe.output / "final")
    return model


def main() -> None:
    recipe = CausalRecipe.from_command_line(__doc__.splitlines()[0], output=Recipe.output / "causal")
    train(recipe)
    print(f"checkpoint in {recipe.output / 'final'}")


if __name__ == "__main__":
    main()
