"""One sort for all canvases, of integer keys ordered by canvas, then forced rows, then score."""

import torch


def lowest_rows(score, forced, starts, places, total):
    """See dispatch.py. With several canvases, output shapes depend on input shapes only."""
    if len(starts) == 2:
        return of_one(score, forced, starts.tolist(), places.tolist(), total)
    rows = torch.arange(len(score), device=score.device)
    starts, places = starts.long(), places.long()
    canvas = torch.bucketize(rows, starts[1:], right=True)  # [T], C for padding rows
    key = (canvas << 33) + in_order(score).masked_fill_(forced, 0)
    row = key.argsort(stable=True)  # stays grouped by canvas, because rows are
    first = torch.cat([starts, starts[-1:]])[canvas]
    room = torch.cat([places.diff(), places.new_zeros(1)])[canvas]
    taken = torch.empty_like(forced).scatter_(0, row, rows - first < room)
    # before[row] - before[first]: rows of the same canvas taken before this row
    before = torch.cat([places.new_zeros(1), taken.cumsum(0)])
    place = torch.cat([places, places[-1:]])[canvas] + before[:-1] - before[first]
    out = places.new_full((total + 1,), -1)
    return out.scatter_(0, torch.where(taken, place, total), torch.where(taken, rows, -1))[:total]


def of_one(score, forced, starts, places, total):
    (begin, end), (place, stop) = starts, places
    own = score[begin:end].masked_fill(forced[begin:end], -torch.inf)
    rows = own.argsort(stable=True)[: stop - place].sort().values + begin
    if len(rows) == total:
        return rows
    out = rows.new_full((total,), -1)
    out[place : place + len(rows)] = rows
    return out


def in_order(score):
    """[T] float32 -> [T] int64 from 1 to 2^32 in the same order"""
    score = torch.where(score.isnan(), torch.nan, score) + 0.0  # one bit pattern for NaN, and -0 ties with 0
    bits = score.view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31) + 1
