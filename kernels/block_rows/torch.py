"""Advanced indexing. Rows without a place are masked when reading and skipped when writing."""

from vllm_dlm.kernels.packed_attention.cache import PackedCache


def placed(block, offset, index):
    """-> block, offset and whether the row has a place, [n] each"""
    if index is not None:
        rows = index.clamp_min(0)
        block, offset = block[rows].masked_fill(index < 0, -1), offset[rows]
    return block, offset, block >= 0


def as_rows(cache, width):
    """A view [blocks, rows, width]"""
    blocks = cache.view(len(cache), -1)
    rows = blocks.shape[1] // width
    return blocks[:, : rows * width].unflatten(1, (rows, width))


def read_rows(cache, width, block, offset, index):
    """See dispatch.py"""
    block, offset, there = placed(block, offset, index)
    return kept(as_rows(cache, width)[block.clamp_min(0), offset], there)


def write_rows(cache, block, offset, values, index):
    """See dispatch.py"""
    block, offset, there = placed(block, offset, index)
    if not there.all():
        block, offset, values = block[there], offset[there], values[there]
    as_rows(cache, values.shape[1])[block, offset] = values


def read_values(cache, block, offset, index):
    """See dispatch.py"""
    block, offset, there = placed(block, offset, index)
    if isinstance(cache, PackedCache):
        return kept(cache.read_values(block.clamp_min(0), offset), there)
    return kept(cache.transpose(1, 2)[block.clamp_min(0), offset, :, cache.shape[3] // 2 :], there)


def read_keys(cache, block, offset):
    """See dispatch.py"""
    if isinstance(cache, PackedCache):
        return cache.read_keys(block, offset)
    return cache.transpose(1, 2)[block, offset, :, : cache.shape[3] // 2]


def kept(values, there):
    if there.all():
        return values
    return values.masked_fill_(~there.view(-1, *[1] * (values.ndim - 1)), 0)
