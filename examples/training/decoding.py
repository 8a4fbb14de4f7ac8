"""The demo's decoding loops around transformers' models: what demo/decoding.py asks of a model, and exact match."""

import torch
from transformers import DynamicCache

from examples.demo import tokenizer as tok
from examples.demo.decoding import answers
from examples.demo.tasks import Sample


class Reader:
    """A bidirectional model whose response selects pages of the prompt, in every step anew, and sees itself whole."""

    def __init__(self, model, dense: bool = False):
        self.model, self.dense = model.eval(), dense

    def _prompt(self, rows: int, prompt: int, length: int) -> dict:
        if self.dense:
            return {}
        return {"prompt_mask": (torch.arange(length) < prompt).expand(rows, -1)}

    def __call__(self, ids: torch.Tensor, tail: int) -> torch.Tensor:
        """ids [B, N] -> logits [B, tail, V]"""
        rows, length = ids.shape
        return self.model(ids, logits_to_keep=tail, **self._prompt(rows, length - tail, length)).logits

    def keys_and_values(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every layer, [B, H, N, D]. The prompt's rows read everything, so that what is response here hardly
        matters to them, but it is as in `__call__`."""
        cache = DynamicCache()
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **self._prompt(*self._shape(ids)))
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _shape(self, ids: torch.Tensor) -> tuple[int, int, int]:
        hidden = int((ids == tok.MASK).sum(1).max())
        return len(ids), ids.shape[1] - hidden, ids.shape[1]

    def forward_on(self, prompt_kv, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, R] of the canvas -> logits [B, R, V]"""
        cache = DynamicCache()
        for index, (k, v) in enumerate(prompt_kv):
            cache.update(k, v, index)
        rows, canvas = ids.shape
        prompt = prompt_kv[0][0].shape[2]
        place = torch.arange(prompt, prompt + canvas)[None]
        given = self._prompt(rows, prompt, prompt + canvas)
        return self.model(ids, past_key_values=cache, position_ids=place, use_cache=True, **given).logits


@torch.no_grad()
def exact_match(reader: Reader, samples: list[Sample], canvas: int, refresh: str, progress=None) -> list[bool]:
    right = []
    for start in range(0, len(samples), 16):
        part = samples[start : start + 16]
        found = answers(reader, part, canvas, refresh=refresh)
        right += [answer == sample.answer_ids for answer, sample in zip(found, part, strict=True)]
        if progress is not None:
            progress.update(len(part))
    return right
