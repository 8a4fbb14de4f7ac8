"""Which tokens may stand at a position, on the way to the head: rows of bits, each sent once a step."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_dlm.automaton import Automaton
from vllm_dlm.engine.holes import Holes

#: what a token gets that may not stand; it stays finite where it is divided by a temperature
RULED_OUT = -1e30
#: so many bits are spread out at once
PIECE = 1 << 22


def bits_of(automaton: Automaton, classes: bytes, width: int) -> np.ndarray:
    """[ceil(width / 32)] int32: a bit for each of `width` tokens"""
    cache = automaton.bits
    if (classes, width) not in cache:
        marked = np.zeros(width, np.bool_)
        of = automaton.classes[:width]
        marked[: len(of)] = np.isin(of, np.frombuffer(classes, np.int16))
        padded = np.zeros(-(-width // 32) * 32, np.bool_)
        padded[:width] = marked
        cache[classes, width] = np.packbits(padded, bitorder="little").view(np.int32)
    return cache[classes, width]


def table(requests: Sequence[tuple[Holes | None, np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each position of each request which row of bits is its own: rows [S, W] int32, and [R] int64"""
    rows: list[np.ndarray] = [np.full(-(-width // 32), -1, np.int32)]
    known: dict[tuple[int, bytes] | None, int] = {None: 0}
    which = []
    for holes, positions in requests:
        for position in positions.tolist():
            found = holes.allowed(position) if holes else None
            key = found and (id(found[0]), found[1])
            if key not in known:
                assert found is not None
                known[key] = len(rows)
                rows.append(bits_of(*found, width))
            which.append(known[key])
    return np.stack(rows), np.array(which, np.int64)


def rule_out_others(logits_RV: torch.Tensor, rows_SW: torch.Tensor, which_R: torch.Tensor) -> None:
    """In place."""
    size = logits_RV.shape[1]
    octets_SB = rows_SW.view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits_RV.device)
    step = max(PIECE // size, 1)
    for start in range(0, len(logits_RV), step):
        octets_RB = octets_SB[which_R[start : start + step]]
        bits_RV = ((octets_RB.unsqueeze(2) >> shifts) & 1).flatten(1)[:, :size]
        logits_RV[start : start + step].masked_fill_(bits_RV == 0, RULED_OUT)
