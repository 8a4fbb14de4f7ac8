"""Train the demo checkpoint: `python -m examples.demo.train`. The one of long answers: `--course walks`.

Stops and goes on: the state file holds weights, optimisers and step, and lessons depend on
(seed, step) alone. Run the same command again to continue; `--fresh` starts over.

Each step learns from two batches. Two workers of one thread each take one batch apiece and add up
their gradients; that is far faster than one process of two threads on matrices this small, and
the sum is the same, so a run may go on with another number of workers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tqdm import tqdm

from .init import WALK, build_lookup_circuit
from .lessons import Batch, Lessons
from .model import DemoLLaDA, Shape, save_checkpoint
from .walks import Walks

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Recipe:
    course: str = "demo"
    seed: int = 0
    steps: int = 2200
    recall_tokens: int = 3000
    small_tokens: int = 4000
    matrix_lr: float = 0.01  # Muon, on the matrices inside the blocks
    other_lr: float = 3e-3  # AdamW, on embedding, norms and head
    weight_decay: float = 0.01
    warm_up: int = 50
    decay_steps: int = 750  # at the end, over which both rates fall linearly to zero
    layers: int = 4
    rope_theta: float = 100_000.0
    bfloat16: bool = True  # products, where the machine is faster at them


RECIPES = {
    "demo": Recipe(),
    "walks": Recipe(course="walks", steps=600, decay_steps=210, bfloat16=False),
}
OUTPUTS = {"demo": ROOT / "vllm_dlm/demo/checkpoint", "walks": ROOT / "examples/demo/walker"}


class Training:
    """Everything a run consists of; `state` and `restore` are each other's inverse."""

    def __init__(self, recipe: Recipe, worker: int = 0, workers: int = 1):
        self.worker, self.workers = worker, workers
        torch.manual_seed(recipe.seed)
        self.recipe, self.step, self.seconds = recipe, 0, 0.0
        self.model = DemoLLaDA(Shape(layers=recipe.layers, rope_theta=recipe.rope_theta))
        self.lessons: Lessons | Walks
        if recipe.course == "walks":
            self.lessons = Walks(recipe.seed)
            build_lookup_circuit(self.model, WALK)
        else:
            self.lessons = Lessons(recipe.seed, recipe.recall_tokens, recipe.small_tokens)
            build_lookup_circuit(self.model)
        matrices = [p for p in self.model.parts.blocks.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in inside]
        self.optimisers = [
            torch.optim.Muon(
                matrices,
                lr=recipe.matrix_lr,
                weight_decay=recipe.weight_decay,
                momentum=0.95,
                nesterov=True,
                adjust_lr_fn="original",
            ),
            torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay),
        ]
        self.peaks = [recipe.matrix_lr, recipe.other_lr]
        self.accuracy: dict[str, float] = {}  # moving averages, for the progress line only
        self.own: set[str] = set()  # names of the batches that this worker took

    def learn(self) -> None:
        """One optimiser step on the two batches of a lesson."""
        began = time.perf_counter()
        for batch in self.lessons.batches(self.step)[self.worker :: self.workers]:
            self._loss(batch).backward()
        if self.workers > 1:
            self._add_up_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rising = (self.step + 1) / self.recipe.warm_up
        falling = (self.recipe.steps - self.step) / self.recipe.decay_steps
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=False):
            for group in optimiser.param_groups:
                group["lr"] = peak * min(1.0, rising, falling)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.perf_counter() - began

    def _loss(self, batch: Batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bfloat16):
            logits_NV = self.model(batch.ids_BT, batch.tail, batch.masked_BR)
        if batch.graded_N.any():
            right = (logits_NV.argmax(-1) == batch.labels_N)[batch.graded_N].float().mean().item()
            self.own.add(batch.name)
            old = self.accuracy.get(batch.name, right)
            self.accuracy[batch.name] = 0.95 * old + 0.05 * right
        return (F.cross_entropy(logits_NV, batch.labels_N, reduction="none") * batch.weights_N).sum()

    def _add_up_gradients(self) -> None:
        gradients = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=False):
            gradient.copy_(part.view_as(gradient))

    def share_accuracy(self) -> None:
        if self.workers > 1:
            gathered: list = [None] * self.workers
            dist.all_gather_object(gathered, {name: self.accuracy[name] for name in self.own})
            for theirs in gathered:
                self.accuracy.update(theirs)

    def state(self) -> dict:
        return {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "accuracy": self.accuracy,
            "optimisers": [o.state_dict() for o in self.optimisers],
            "torch_rng": torch.get_rng_state(),
        }

    def restore(self, state: dict) -> None:
        # A run may be made longer or shorter while its rates are still constant; all else is fixed.
        later = {"steps": 0, "decay_steps": 0}
        if {**state["recipe"], **later} != {**asdict(self.recipe), **later}:
            raise SystemExit(f"the state file belongs to another recipe: {state['recipe']}; pass --fresh to start over")
        self.step, self.seconds = state["step"], state["seconds"]
        self.accuracy = dict(state["accuracy"])
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=False):
            optimiser.load_state_dict(saved)
        torch.set_rng_state(state["torch_rng"])


def _save_state(training: Training, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(training.state(), partial)
    os.replace(partial, path)


def run(worker: int, options: dict, rendezvous: str) -> None:
    workers = options["workers"]
    torch.set_num_threads(options["threads"])
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=worker, world_size=workers)
    recipe = Recipe(**{name: options[name] for name in asdict(Recipe())})
    training = Training(recipe, worker, workers)
    if options["state"].exists() and not options["fresh"]:
        training.restore(torch.load(options["state"], weights_only=True))
    if workers > 1:
        dist.barrier()  # nobody may write the state file before everybody has read it
    with tqdm(total=recipe.steps, initial=training.step, unit="step", mininterval=1.0, disable=worker > 0) as bar:
        while training.step < recipe.steps:
            training.learn()
            bar.update()
            log, save = (training.step % options[e] == 0 for e in ("log_every", "save_every"))
            if log or save:
                training.share_accuracy()
            if log and worker == 0:
                seen = " ".join(f"{k} {v:.3f}" for k, v in sorted(training.accuracy.items()))
                bar.write(f"{training.seconds / 60:5.1f} min, step {training.step}: {seen}")
            if save and worker == 0:
                _save_state(training, options["state"])
    if worker == 0:
        save_checkpoint(training.model, options["output"])
        _save_state(training, options["state"])
        print(f"{training.seconds / 60:.1f} minutes of steps; checkpoint in {options['output']}")
    if workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--course", choices=sorted(RECIPES), default="demo")
    recipe = RECIPES[parser.parse_known_args()[0].course]
    parser.add_argument("--output", type=Path, default=OUTPUTS[recipe.course])
    parser.add_argument("--state", type=Path, default=ROOT / f"runs/{recipe.course}/state.pt")
    parser.add_argument("--fresh", action="store_true", help="ignore an existing state file")
    parser.add_argument("--workers", type=int, choices=[1, 2], default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--save-every", type=int, default=250, help="steps between state files")
    parser.add_argument("--log-every", type=int, default=100, help="steps between printed lines")
    for name, value in asdict(recipe).items():
        if isinstance(value, bool):
            parser.add_argument("--" + name, action=argparse.BooleanOptionalAction, default=value)
        elif name != "course":
            parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        if options["workers"] == 1:
            run(0, options, rendezvous)
        else:
            mp.spawn(run, (options, rendezvous), nprocs=options["workers"])


if __name__ == "__main__":
    main()
