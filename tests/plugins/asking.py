"""Builds inputs of `Selection.choose` for canvases, without an engine."""

import torch

from vllm_dlm.plugins.selection.base import CachedPrompts, ChoiceQuery, Selection, Summaries

#: positions per KV block
BLOCK = 64


def canvas_asks(selection: Selection, q, keys, prompt_len=None, length=None, voters=None, scale=None) -> ChoiceQuery:
    """Input for one canvas. q [L, H, D]; keys [N, Hkv, D] of the canvas or of its prompt, which are also the values"""
    return canvases_ask(selection, [q], [keys], [prompt_len], [length], [voters], scale)


def canvases_ask(selection: Selection, qs, keys, prompt_lens, lengths, voters, scale=None) -> ChoiceQuery:
    """Input for several canvases. None means: prompt as long as the keys, canvas as long as prompt and queries, all
    queries vote"""
    prompt_lens = [len(own) if n is None else n for n, own in zip(prompt_lens, keys, strict=True)]
    voters = [torch.ones(len(q), dtype=torch.bool) if v is None else v for v, q in zip(voters, qs, strict=True)]
    lengths = [n + len(q) if own is None else own for own, n, q in zip(lengths, prompt_lens, qs, strict=True)]
    blocks = [-(-len(own) // BLOCK) for own in keys]
    cache, parts = torch.zeros(sum(blocks), keys[0].shape[1], BLOCK, 2 * keys[0].shape[2], dtype=keys[0].dtype), []
    for own, place in zip(keys, torch.arange(sum(blocks)).split(blocks), strict=True):
        position = torch.arange(len(own))
        cache.transpose(1, 2)[place[position // BLOCK], position % BLOCK] = torch.cat([own, own], -1)
        free = selection.prompt_units(prompt_lens[len(parts)]).candidates
        parts.append(selection.summarise(own[:free], [free]))
    described = [len(first) for first, _ in parts]
    starts = torch.tensor([0, *map(len, qs)]).cumsum(0)
    prompts = CachedPrompts(
        cache,
        pad(torch.arange(sum(blocks)).split(blocks)),
        prompt_lens,
        lengths,
        torch.tensor([selection.prompt_units(n).numbers for n in prompt_lens], dtype=torch.int32).T.contiguous(),
        qs[0].shape[2] ** -0.5 if scale is None else scale,
        torch.cat(voters),
    )
    summaries = Summaries(*(torch.cat(vectors) for vectors in zip(*parts, strict=True)))
    table = pad(torch.arange(sum(described)).split(described))
    most = max(map(len, qs))
    return ChoiceQuery(torch.cat(qs), starts[:-1], starts[1:], most, summaries, table, torch.tensor(described), prompts)


def pad(tables):
    return torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
