"""A canvas that asks a selection, without an engine."""

import torch

from vllm_dlm.plugins.selection.base import Asked, CachedPrompt, Selection, Summaries


def canvas_asks(selection: Selection, q, keys, prompt_len=None, length=None, voters=None, scale=None) -> Asked:
    """q [L, H, D]; cached keys [N, Hkv, D] of the canvas or of its prompt, which are its values too"""
    prompt_len = len(keys) if prompt_len is None else prompt_len
    by_head = torch.cat([keys, keys], -1).transpose(0, 1)  # [Hkv, N, 2 * D]

    def read(runs, size):
        whole = by_head[:, : len(keys) // size * size].unflatten(1, (-1, size))
        return torch.stack([own[where] for own, where in zip(whole, runs.long(), strict=True)])

    summaries = Summaries(*selection.summarise(keys[:prompt_len]))
    prompt = CachedPrompt(
        torch.ones(len(q), dtype=torch.bool) if voters is None else voters, read, prompt_len,
        prompt_len + len(q) if length is None else length, q.shape[2] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    ends = torch.tensor([-(-prompt_len // selection.unit)])
    return Asked(q[None], summaries, None, torch.tensor([len(summaries.first)]), ends, prompt)
