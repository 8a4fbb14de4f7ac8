"""LLaDA's loss: mask each response token with probability t, t uniform, and weight the cross entropy by 1 / t."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer


@dataclass
class MaskedDiffusionCollator:
    """Collates samples {"prompt": ids, "answer": ids, "t": share to mask, "seed": …} to inputs of
    MaskedDiffusionTrainer.

    The noise depends on the sample's seed alone, so a resumed run masks the
    same tokens. Answers are padded with `end` to the longest of the batch or to
    `canvas`. As in LLaDA, this padding is part of the loss.
    """

    mask: int
    end: int
    canvas: int = 0
    pad: int | None = None  # token for left padding of shorter prompts; None: `end`

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        response = max(self.canvas, *(len(s["answer"]) for s in samples))
        prompt = max(len(s["prompt"]) for s in samples)
        rows = len(samples)
        ids = torch.full((rows, prompt + response), self.end if self.pad is None else self.pad)  # [B, N]
        there = torch.zeros(rows, prompt + response, dtype=torch.long)
        rate = torch.empty(rows)
        hidden = torch.zeros(rows, prompt + response, dtype=torch.bool)
        ids[:, prompt:] = self.end
        for row, sample in enumerate(samples):
            ids[row, prompt - len(sample["prompt"]) : prompt] = torch.as_tensor(sample["prompt"])
            ids[row, prompt : prompt + len(sample["answer"])] = torch.as_tensor(sample["answer"])
            there[row, prompt - len(sample["prompt"]) :] = 1
            rate[row] = sample["t"]
            noise = torch.rand(response, generator=torch.Generator().manual_seed(int(sample["seed"])))
            hidden[row, prompt:] = noise < sample["t"]
        labels = ids.masked_fill(~hidden, -100)
        inputs = {"input_ids": ids.masked_fill(hidden, self.mask), "labels": labels}
        inputs["weights"] = (1 / (rate * response))[:, None].expand_as(labels).contiguous()  # mean over the response
        inputs["prompt_mask"] = (torch.arange(prompt + response) < prompt).expand(rows, -1) & there.bool()
        if not bool(there.all()):
            inputs["attention_mask"] = there
            inputs["position_ids"] = (there.cumsum(1) - 1).clamp_min(0)
        return inputs


def masked_diffusion_loss(
    logits: torch.Tensor,  # [B, N, V]
    labels: torch.Tensor,  # [B, N], -100 for tokens that are not masked
    weights: torch.Tensor,  # [B, N]
    shift: int = 0,  # logits at i predict position i + shift; 1 for Dream
) -> torch.Tensor:
    if shift:
        logits, labels, weights = logits[:, :-shift], labels[:, shift:], weights[:, shift:]
    asked = labels != -100
    found = cross_entropy(logits[asked].float(), labels[asked], reduction="none")
    return (found * weights[asked]).sum() / len(labels)


class MaskedDiffusionTrainer(Trainer):
    """transformers' Trainer with this loss. Needs `remove_unused_columns=False` to keep `weights` and `prompt_mask`."""

    def __init__(self, *args, shift: int = 0, sees_prompts: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.shift, self.sees_prompts = shift, sees_prompts
        self.model_accepts_loss_kwargs = False  # the loss is a mean over rows, also with gradient accumulation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        labels, weights = inputs.pop("labels"), inputs.pop("weights")
        if not self.sees_prompts:  # other attention implementations may not accept the argument
            inputs.pop("prompt_mask")
        outputs = model(**inputs)
        loss = masked_diffusion_loss(outputs.logits, labels, weights, self.shift)
        return (loss, outputs) if return_outputs else loss
