"""The definition: rotation row by row in the table's precision, then the write to the cache."""

import torch


def rotary_write(q, k, v, table, positions, block, offset, cache, index):
    """See dispatch.py; padding rows are zeros"""
    dim = table.shape[1]

    def rotated(x):
        if x is None:
            return None
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        for i in range(len(x)):
            row = i if index is None else int(index[i])
            if row >= 0:
                cos, sin = table[int(positions[row])].chunk(2)
                a, b = x[i].to(table.dtype).chunk(2, -1)
                out[i] = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
        return out

    q, k = rotated(q), rotated(k)
    for x, part in ((k, slice(0, dim)), (v, slice(dim, None))):
        if x is None or cache is None:
            continue
        for i in range(len(x)):
            row = i if index is None else int(index[i])
            if row >= 0 and block[row] >= 0:
                cache[int(block[row]), :, int(offset[row]), part] = x[i]
    return q, k
