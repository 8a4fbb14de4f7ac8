"""Counter-based noise: a pure function of (seed, block, step, position, token).

No generator state is kept, so a request's samples do not depend on other
requests in its batch, chunking of rows, preemption, the device or the
tensor-parallel rank.
"""

import numpy as np
import torch

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX1 = -0x40A7B892E31B1A47  # constants of the splitmix64 finaliser
_MIX2 = -0x6B2FB644ECCEEE15
_NOISE, _ORDER = 1, 2  # independent streams of one row


def row_keys(seeds: np.ndarray, blocks: np.ndarray, steps: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Seed, canvas block and step of each row's request, and the row's position, [R] int64 each -> one 64-bit key per
    row."""
    key = seeds
    for part in (blocks, steps):
        key = _mix(key * 31 + part + 1)
    return _mix(key + positions * _GOLDEN)


def exponential(keys_R: torch.Tensor, size: int) -> torch.Tensor:
    """Exp(1) noise [R, size] in float64."""
    return uniform_bits(_mix(keys_R + _NOISE)[:, None], torch.arange(size, device=keys_R.device)).log_().neg_()


def uniform(keys_R: torch.Tensor) -> torch.Tensor:
    """Uniform noise [R] in float32."""
    return uniform_bits(_mix(keys_R + _ORDER), 0).float()


def uniform_bits(key: torch.Tensor, counter) -> torch.Tensor:
    """Uniform in (0, 1), float64 from the upper 53 bits."""
    bits = _shift(_mix(key + counter * _GOLDEN), 11)
    return bits.double().add_(0.5).mul_(2.0**-53)


def _mix(x):
    """splitmix64 of int64 in torch or numpy; both wrap around on overflow."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x, bits: int):
    """Logical right shift; `>>` of int64 is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
