"""The definition."""

import torch


def compact_rows(mask, starts, capacity):
    """See dispatch.py"""
    end = len(mask) if starts is None else int(starts[-1])
    rows = [row for row in range(end) if mask[row]][:capacity]
    index = torch.tensor(rows + [-1] * (capacity - len(rows)), dtype=torch.int64)
    if starts is None:
        return index, None
    return index, torch.tensor([sum(row < start for row in rows) for start in starts.tolist()], dtype=torch.int32)
