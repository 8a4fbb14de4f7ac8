"""A prefix sum over the mask gives each marked row its place in the list."""

import torch


def compact_rows(mask, starts, capacity):
    """See dispatch.py. Output shapes depend on input shapes only."""
    row = torch.arange(len(mask), device=mask.device)
    if starts is not None:
        mask = mask & (row < starts[-1])
    count = torch.nn.functional.pad(mask.cumsum(0), (1, 0)).clamp_max_(capacity)  # [T + 1] marked rows before each row
    index = row.new_full((capacity + 1,), -1)  # the extra entry collects rows that are not listed
    index.scatter_(0, torch.where(mask, count[:-1], capacity), row)
    return index[:capacity], None if starts is None else count[starts.long()].to(torch.int32)
