"""The definition, in float64: the wavelet transform's bands, then means and variances from them."""

import torch


def haar_bands(keys: torch.Tensor, levels: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """keys [..., P, D] -> low-pass band [..., P / 2^levels, D] and the detail bands of scales 1 … levels"""
    low, details = keys, []
    for _ in range(levels):
        even, odd = low[..., 0::2, :], low[..., 1::2, :]
        low = (even + odd) / 2**0.5
        details.append((even - odd) / 2**0.5)
    return low, details


def haar_pyramid(cache, page_ids, page_size, levels):
    """-> for each level b: mean and variance of runs of 2^b keys, [n, Hkv, page_size / 2^b, D] each"""
    _blocks, _kv_heads, block_size, width = cache.shape
    per_block = block_size // page_size
    keys = torch.stack(
        [
            cache[page // per_block, :, page % per_block * page_size :][:, :page_size, : width // 2].double()
            for page in page_ids.tolist()
        ]
    )  # [n, Hkv, page_size, D]
    out = []
    for level in levels:
        low, details = haar_bands(keys, level)
        energy = sum(
            band.square().unflatten(-2, (low.shape[-2], -1)).sum(-2) for band in details
        )  # energy of all details below each node
        out.append((low / 2 ** (level / 2), energy / 2**level if details else torch.zeros_like(low)))
    return out
