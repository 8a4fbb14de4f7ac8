"""A template in a step: which of the chosen tokens are accepted, and what follows from them."""

from dataclasses import replace

import numpy as np

from vllm_dlm.automaton import Automaton
from vllm_dlm.client_cache import ClientCache
from vllm_dlm.engine.canvas import Canvas, Commit
from vllm_dlm.engine.holes import Holes

#: of this worker, by content: requests with equal holes share one
AUTOMATA: ClientCache[str, Automaton] = ClientCache("automata")


def automaton_of(plain: dict) -> Automaton:
    found = AUTOMATA.get(plain["key"])
    return AUTOMATA.put(plain["key"], Automaton.from_plain(plain)) if found is None else found


def holes_of(canvas: Canvas) -> Holes | None:
    layout = canvas.layout
    if not layout.holes:
        return None
    automata = [automaton_of(plain) for plain in layout.automata]
    holes = [(canvas.prompt_len + start, length, automata[of]) for start, length, of in layout.holes]
    return Holes(holes, canvas.tokens, canvas.mask_id, layout.ends[0])


def in_order(chosen: np.ndarray, prob: np.ndarray, standing: np.ndarray) -> list[int]:
    """Masks before tokens that become others, so that each step fills one; then the most probable first."""
    return chosen[np.lexsort((-prob[chosen], standing[chosen]))].tolist()


def closed(commit: Commit, holes: Holes) -> Commit:
    """Fills the rest of the holes that have ended with it, also after the canvas block."""
    over = holes.over()
    holes.put(commit.revoked.tolist(), None)
    if not len(over):
        return commit
    read = np.union1d(commit.read, over)
    confidence = np.ones(len(read), np.float32)
    confidence[np.searchsorted(read, commit.read)] = commit.confidence
    confidence[np.searchsorted(read, over)] = 1.0
    tokens = dict(zip(commit.positions.tolist(), commit.tokens.tolist(), strict=True))
    tokens |= dict.fromkeys(over.tolist(), holes.end_token)
    where = np.array(sorted(tokens), np.int64)
    values = np.array([tokens[position] for position in where.tolist()], np.int64)
    return replace(commit, read=read, confidence=confidence, filled=np.searchsorted(read, where), tokens=values)
