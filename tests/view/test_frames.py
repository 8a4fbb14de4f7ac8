"""Frames add up: however many of them are merged, they lead to the same canvas."""

import random

import numpy as np
import pytest

from vllm_dlm.view.frames import CHANGES, Replay, averaged, changes, merged, runs


def some_frames(seed: int, length: int = 12, steps: int = 30) -> list[dict]:
    """Of a canvas whose positions are filled, taken back and changed at random."""
    rng, filled, frames = random.Random(seed), set(), []
    for step in range(1, steps + 1):
        frame = {kind: [] for kind in CHANGES}
        for at in rng.sample(range(length), rng.randint(0, 5)):
            entry = [at, rng.randrange(99), "a", 0.5, step]
            if at not in filled:
                frame["set"].append(entry)
                filled.add(at)
            elif rng.random() < 0.5:
                frame["edited"].append(entry)
            else:
                frame["unset"].append([at, step])
                filled.discard(at)
        frames.append(
            frame | {
                "step": step, "steps": 1, "ms": 1.5, "requests": 1, "block": 1, "guesses": [[step, "g", 0.1, []]],
                "rows": {"live": 2, "recomputed": 1, "dense": 3}, "keys": {"read": 1, "of": 2},
                "heat": {"rows": [[-3, step % 5, 0.5]], "pages": []},
            }
        )  # fmt: skip
    return frames


def after(frames: list[dict]) -> dict:
    replay = Replay(12)
    for frame in frames:
        replay.apply(frame)
    return replay.filled


@pytest.mark.parametrize("seed", range(20))
def test_merged_frames_lead_to_the_same(seed):
    frames, rng = some_frames(seed), random.Random(seed + 100)
    fewer = list(frames)
    while len(fewer) > 1:
        at = rng.randrange(len(fewer) - 1)
        fewer[at : at + 2] = [merged(fewer[at], fewer[at + 1])]
        assert after(fewer) == after(frames)
        told = [entry[0] for frame in fewer[at : at + 1] for kind in CHANGES for entry in frame[kind]]
        assert len(told) == len(set(told))
    (one,) = fewer
    assert one["steps"] == one["step"] == 30 and one["ms"] == pytest.approx(45)
    assert one["rows"] == {"live": 60, "recomputed": 30, "dense": 90} and one["guesses"] == frames[-1]["guesses"]


def test_what_was_filled_and_taken_back_is_nothing():
    nothing: dict[str, list] = {kind: [] for kind in CHANGES}
    filled, taken = nothing | {"set": [[3, 7, "a", 0.5, 1]]}, nothing | {"unset": [[3, 2]]}
    assert changes(filled, taken) == nothing
    assert changes(taken, filled) == nothing | {"edited": [[3, 7, "a", 0.5, 1]]}


def test_who_comes_late_is_told_all_of_it():
    frames, late = some_frames(3), Replay(12)
    for frame in frames[:20]:
        late.apply(frame)
    assert after([late.so_far, *frames[20:]]) == after(frames)
    one = late.so_far
    for frame in frames[20:]:
        one = merged(one, frame)
    assert after([one]) == after(frames)


def test_runs_of_equal_share():
    shares = np.array([0, 0, 0.5, 0.5, 1, 0, 0.25])
    assert runs(shares, -2) == [[0, 1, 0.5], [2, 2, 1.0], [4, 4, 0.25]]
    assert runs(np.zeros(3)) == runs(np.zeros(0)) == []


def test_the_mean_of_shares_weighs_steps():
    assert averaged([[0, 3, 1.0]], [[2, 5, 0.5]], 0.75) == [[0, 1, 0.75], [2, 3, 0.875], [4, 5, 0.125]]
    assert averaged([], [], 0.5) == [] and averaged([[1, 2, 0.5]], [], 0.5) == [[1, 2, 0.25]]
