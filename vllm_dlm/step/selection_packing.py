"""Packs the data of a group's selection before the forward, for the same transfer as the batch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from vllm_dlm.cache.blocks import Slots
from vllm_dlm.canvas.selected_keys import SelectedKeys
from vllm_dlm.step.selection import Choosers, FinalKeys, GroupSelection, NewKeys

Upload = Callable[[np.ndarray], torch.Tensor]


def group_selection(
    keys: list[SelectedKeys], live: Sequence[int], prompts: Sequence[int], whole: bool, upload: Upload
) -> GroupSelection:
    """`live`: number of live rows of each stream; `prompts`: number of these before the response; `whole`: every row of
    every stream is recomputed, so that no earlier choice is valid"""
    prompts = list(prompts)
    responses = [rows - before for rows, before in zip(live, prompts, strict=True)]
    ends = np.cumsum(live, dtype=np.int64)
    bounds = np.stack([ends - responses, ends])
    tables = [own.kv_table for own in keys]
    bounds_there, tables_there = upload(bounds), upload(padded(tables))
    choosers = None
    if chooses := [i for i, own in enumerate(keys) if whole or own.chooses]:
        some, part = [keys[i] for i in chooses], len(chooses) < len(keys)
        choosers = Choosers(
            some,
            max(responses[i] for i in chooses),
            upload(np.ascontiguousarray(bounds[:, chooses])) if part else bounds_there,
            upload(padded([tables[i] for i in chooses])) if part else tables_there,
            upload(padded([own.summary_table for own in some])),
            upload(np.array([own.units.summaries for own in some], np.int32)),
            upload(np.array([own.units.numbers for own in some], np.int32).T.copy()),
            upload(np.array([own.slot for own in some], np.int64)),
            upload(np.array([own.known and not whole for own in some])),
        )
    return GroupSelection(
        keys,
        prompts,
        bounds_there,
        tables_there,
        lengths=upload(np.array([own.length for own in keys], np.int32)),
        free=upload(np.array([own.free for own in keys], np.int32)),
        slots=upload(np.array([own.slot for own in keys], np.int64)),
        choosers=choosers,
        new=new_keys(keys, live, upload) if whole else None,
        final=final_keys(keys, upload),
    )


def new_keys(keys: list[SelectedKeys], live: Sequence[int], upload: Upload) -> NewKeys:
    lens = [own.units.candidates for own in keys]
    starts = np.cumsum([0, *live[:-1]])
    rows: slice | torch.Tensor = slice(0, lens[0])  # a single stream needs no gather
    if len(keys) > 1:
        rows = upload(np.concatenate([start + np.arange(n) for start, n in zip(starts, lens, strict=True)]))
    return NewKeys(rows, lens, summary_slots(keys, upload))


def final_keys(keys: list[SelectedKeys], upload: Upload) -> FinalKeys | None:
    new = [own for own in keys if not own.described]
    for own in new:
        own.described = True
    if not new:
        return None
    lens = [own.units.candidates for own in new]
    tables = [own.kv_table for own in new]
    return FinalKeys(slots(tables, lens, new[0].block_size, upload), lens, summary_slots(new, upload))


def summary_slots(keys: list[SelectedKeys], upload: Upload) -> Slots:
    tables, counts = [own.summary_table for own in keys], [own.units.summaries for own in keys]
    return slots(tables, counts, keys[0].block_size, upload)


def slots(tables: list[np.ndarray], counts: list[int], size: int, upload: Upload) -> Slots:
    """The first `counts[i]` slots of each table of blocks"""
    places = [(table, np.arange(count)) for table, count in zip(tables, counts, strict=True)]
    return Slots(
        upload(np.concatenate([table[row // size] for table, row in places])),
        upload(np.concatenate([row % size for _, row in places])),
    )


def padded(tables: list[np.ndarray]) -> np.ndarray:
    """Tables of any lengths -> [B, n] int32"""
    out = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(out, tables, strict=True):
        row[: len(table)] = table
    return out
