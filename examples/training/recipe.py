"""What both recipes share: their options, the mask they train on, and transformers' Trainer around it."""

import argparse
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import vllm_dlm.training as sparse

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "vllm_dlm" / "demo" / "checkpoint"
#: what is trained on: everything visible; the sigmoid, annealed; the mask of serving from the first step
MASKS = ("dense", "soft", "hard")
#: fields of a recipe that trained weights do not depend on
RUN = frozenset({"output", "save_every", "threads", "fresh"})


@dataclass
class Recipe:
    mask: str = "soft"
    seed: int = 0
    steps: int = 300
    batch: int = 8
    length: int = 512  # of a prompt
    needles: int = 16
    learning_rate: float = 5e-4
    warm_up: int = 20
    # the mask
    budget_tokens: int = 32
    page_size: int = 16
    sink_pages: int = 0
    recent_pages: int = 1
    lam: float = 0.5
    std_kind: str = "l2"
    start: float = 1.0  # temperature
    end: float = 0.1
    schedule: str = "geometric"
    moving_threshold: bool = False  # gradients go through the threshold too
    hard_share: float = 0.0  # of the steps, at the end
    # the run
    output: Path = ROOT / "runs" / "train"
    save_every: int = 50
    threads: int = 1
    fresh: bool = False  # begin again, whatever lies in the output folder

    @classmethod
    def from_command_line(cls, text: str, **defaults) -> "Recipe":
        parser = argparse.ArgumentParser(description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        given = cls(**defaults)
        for field in fields(cls):
            name, value = "--" + field.name.replace("_", "-"), getattr(given, field.name)
            if isinstance(value, bool):
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=value, help=" ")
            else:
                choices = MASKS if field.name == "mask" else None
                parser.add_argument(name, type=type(value), default=value, choices=choices, help=" ")
        return cls(**vars(parser.parse_args()))

    def __post_init__(self):
        torch.set_num_threads(self.threads)

    @property
    def settings(self) -> sparse.PageSparsity:
        return sparse.PageSparsity(
            budget_tokens=self.budget_tokens,
            page_size=self.page_size,
            sink_pages=self.sink_pages,
            recent_pages=self.recent_pages,
            lam=self.lam,
            std_kind=self.std_kind,
            dense_layers=(),
            temperature=self.start,
            hard=self.mask == "hard",
            stop_threshold=not self.moving_threshold,
        )

    @property
    def callbacks(self) -> list:
        if self.mask != "soft":
            return []
        return [sparse.Anneal(start=self.start, end=self.end, kind=self.schedule, hard_share=self.hard_share)]

    @property
    def samples(self) -> int:
        return self.steps * self.batch

    @property
    def decisive(self) -> dict:
        """What the trained weights depend on."""
        idle = RUN
        if self.mask != "soft":
            idle = idle | {"start", "end", "schedule", "moving_threshold", "hard_share"}
        return {name: value for name, value in vars(self).items() if name not in idle}

    def claim(self) -> None:
        """Makes the output folder this recipe's. What other settings left there is gone on with by nobody: it is
        refused, or removed if `fresh`."""
        stated = self.output / "recipe.json"
        if self.fresh:
            for folder in (*self.output.glob("checkpoint-*"), self.output / "final"):
                shutil.rmtree(folder, ignore_errors=True)
        elif stated.exists():
            left = json.loads(stated.read_text())
            other = {name: value for name, value in self.decisive.items() if left.get(name) != value}
            if other:
                differing = ", ".join(f"{name} {left.get(name)!r} (now {value!r})" for name, value in other.items())
                raise SystemExit(
                    f"{self.output} holds a training with {differing}; give another --output, or --fresh to begin again"
                )
        self.output.mkdir(parents=True, exist_ok=True)
        stated.write_text(json.dumps(self.decisive, indent=1))

    def train(self, trainer) -> None:
        """Goes on from the last checkpoint in the output folder."""
        self.claim()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(self.output)))

    def arguments(self) -> TrainingArguments:
        return TrainingArguments(
            str(self.output),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            use_cpu=not torch.cuda.is_available(),
            learning_rate=self.learning_rate,
            warmup_steps=self.warm_up,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_beta2=0.98,
            logging_steps=10,
            save_strategy="steps",
            save_steps=self.save_every,
            save_total_limit=2,
            seed=self.seed,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
