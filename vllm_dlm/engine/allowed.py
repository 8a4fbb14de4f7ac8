"""Which tokens may be at a position, on the way to the head: rows of bits, each sent once a step."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_dlm.automaton import Automaton
from vllm_dlm.engine.holes import Holes

#: what a token gets that may not be there; it stays finite where it is divided by a temperature
RULED_OUT = -1e30
#: number of bits that are spread out at once
PIECE = 1 << 22


def table(requests: Sequence[tuple[Holes | None, np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of bits, the first one of all tokens, and for each position of each request the number of its row:
    [S, ceil(width / 32)] int32, and [R] int64"""
    found: dict[Automaton, dict[tuple[int, int], int]] = {}  # numbers of rows among those of an automaton
    places = list[tuple[Automaton, int] | None]()
    for holes, positions in requests:
        for position in positions.tolist():
            if (place := holes.between(position) if holes else None) is None:
                places.append(None)
                continue
            automaton, between = place
            known = found.setdefault(automaton, {})
            places.append((automaton, known.setdefault(between, len(known))))
    rows = np.zeros((1 + sum(map(len, found.values())), -(-width // 32)), np.int32)
    rows[0], first, firsts = -1, 1, dict[Automaton, int]()
    for automaton, known in found.items():
        automaton.mark(rows[first : first + len(known)], list(known))
        firsts[automaton], first = first, first + len(known)
    which = [0 if place is None else firsts[place[0]] + place[1] for place in places]
    return rows, np.array(which, np.int64)


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
