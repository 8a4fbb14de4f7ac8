"""The definition, row by row."""


def places(block, offset, index):
    """Yields (i, block, offset) of each row that has a place"""
    for i, row in enumerate(range(len(block)) if index is None else index.tolist()):
        if row >= 0 and block[row] >= 0:
            yield i, int(block[row]), int(offset[row])


def read_rows(cache, width, block, offset, index):
    """See dispatch.py"""
    out = cache.new_zeros(len(block if index is None else index), width)
    for i, b, o in places(block, offset, index):
        out[i] = cache[b].flatten()[o * width : (o + 1) * width]
    return out


def write_rows(cache, block, offset, values, index):
    """See dispatch.py"""
    width = values.shape[1]
    for i, b, o in places(block, offset, index):
        cache[b].view(-1)[o * width : (o + 1) * width] = values[i]


def read_values(cache, block, offset, index):
    """See dispatch.py"""
    _, kv_heads, _, both = cache.shape
    out = cache.new_zeros(len(block if index is None else index), kv_heads, both // 2)
    for i, b, o in places(block, offset, index):
        out[i] = cache[b, :, o, both // 2 :]
    return out
