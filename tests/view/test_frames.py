"""Frames add up: whatever a reader missed, the next frame leads to the same canvas and the same sums."""

import asyncio
import json
import random

import numpy as np
import pytest

from vllm_dlm.view import frames as frames_of_steps
from vllm_dlm.view.frames import CHANGES, Frame, Guesses, History, Replay, json_slices, runs

PROMPT, CANVAS = 3, 12
LENGTH = PROMPT + CANVAS


def some_frames(seed: int, steps: int = 30) -> list[Frame]:
    """Of a canvas whose positions are filled, masked again and changed at random."""
    rng, filled, found = random.Random(seed), set(range(PROMPT)), []
    for step in range(1, steps + 1):
        changed = sorted(rng.sample(range(PROMPT, LENGTH), rng.randint(0, 5)))
        was = np.array([at in filled for at in changed], bool)
        now = ~was | np.array([rng.random() < 0.5 for _ in changed], bool)
        filled = (filled - set(changed)) | {at for at, is_filled in zip(changed, now, strict=True) if is_filled}
        shares = np.zeros((2, LENGTH))
        shares[0, : 3 + step % 5] = 0.5
        at = np.array(changed, np.int64)
        guesses = Guesses.build(np.array([4]), np.array([step]), np.array([0.1]), None)
        sums = np.array([1, 1.5, 2, 1, 3, 1, 2])
        token = np.array([rng.randrange(99) for _ in changed], np.int64)
        found.append(
            Frame(step, 1, 1, at, was, now, token, np.full(len(at), 0.5), np.full(len(at), step), sums, shares, guesses)
        )
    return found


def as_json(frame: Frame) -> dict:
    text = {token: f"<{token}>" for token in frame.tokens}
    return json.loads(b"".join(json_slices(frame, PROMPT, text)))


def history_of(frames: list[Frame]) -> History:
    history = History(np.arange(LENGTH) < PROMPT)
    for frame in frames:
        history.add(frame)
    return history


def after(messages: list[dict]) -> dict:
    replay = Replay(CANVAS)
    for message in messages:
        replay.apply(message)
    return replay.filled


@pytest.mark.parametrize("seed", range(20))
def test_a_reader_that_misses_frames_reaches_the_same_canvas(seed):
    frames, rng = some_frames(seed), random.Random(seed + 100)
    history, read = history_of([]), []
    moment = history.now()
    for frame in frames:
        history.add(frame)
        if rng.random() < 0.3 or frame is frames[-1]:
            read.append(as_json(history.since(moment)))
            moment = history.now()
    assert len(read) < len(frames) and after(read) == after([as_json(frame) for frame in frames])
    for message in read:
        changed = [entry[0] for kind in CHANGES for entry in message[kind]]
        assert len(changed) == len(set(changed))
    assert sum(message["steps"] for message in read) == read[-1]["step"] == 30
    assert sum(message["ms"] for message in read) == pytest.approx(45)
    assert [sum(message["rows"][name] for message in read) for name in ("live", "recomputed", "dense")] == [60, 30, 90]
    assert read[-1]["guesses"] == as_json(frames[-1])["guesses"] == [[1, "<30>", 0.1, []]]


@pytest.mark.parametrize("seed", range(5))
def test_a_frame_survives_the_way_to_the_front_end(seed):
    frames = some_frames(seed)
    assert as_json(history_of([Frame.unpack(frame.pack()) for frame in frames]).since(history_of([]).now())) == as_json(
        history_of(frames).since(history_of([]).now())
    )


def test_the_frame_of_one_step_is_that_step():
    frames = some_frames(1)
    history = history_of(frames[:10])
    moment = history.now()
    history.add(frames[10])
    assert as_json(history.since(moment)) == as_json(frames[10])


def test_a_position_that_was_filled_and_masked_again_is_in_no_list():
    def step(number: int, was: bool, now: bool) -> Frame:
        own = np.array([5])
        columns = own, np.array([was]), np.array([now]), own, np.array([0.5]), np.array([number])
        return Frame(number, 1, 1, *columns, np.array([1.0] * 7), np.zeros((2, LENGTH)))

    filled, masked = step(1, False, True), step(2, True, False)
    start = history_of([]).now()
    both = as_json(history_of([filled, masked]).since(start))
    assert [both[kind] for kind in CHANGES] == [[], [], []]
    history = history_of([filled])
    moment = history.now()
    history.add(masked)
    assert as_json(history.since(moment))["unset"] == [[2, 2]]
    history.add(step(3, False, True))
    assert [entry[0] for entry in as_json(history.since(moment))["edited"]] == [2]


def test_shares_are_means_over_steps():
    frames = some_frames(2)[:2]
    frames[0].shares[0, :], frames[1].shares[0, :] = 1.0, 0.0
    frames[1].shares[1, :4] = 0.5
    heat = as_json(history_of(frames).since(history_of([]).now()))["heat"]
    assert heat == {"rows": [[-3, 11, 0.5]], "pages": [[-3, 0, 0.25]]}


def test_runs_of_equal_share():
    shares = np.array([0, 0, 0.5, 0.5, 1, 0, 0.25])
    assert runs(shares, -2) == [[0, 1, 0.5], [2, 2, 1.0], [4, 4, 0.25]]
    assert runs(np.zeros(3)) == runs(np.zeros(0)) == []


def test_guesses_name_three_others(monkeypatch):
    monkeypatch.setattr(frames_of_steps, "SLICE", 1)  # pieces join to one list
    best = np.array([[[7, 9], [5, 8], [3, 9], [2, 1]], [[0.5, 0.4], [0.3, 0.3], [0.1, 0.2], [0.05, 0.0]]])
    frame = some_frames(1)[0]
    frame.guesses = Guesses.build(np.array([4, 6]), np.array([7, 6]), np.array([0.5, np.nan]), best)
    assert as_json(frame)["guesses"] == [
        [1, "<7>", 0.5, [["<5>", 0.3], ["<3>", 0.1], ["<2>", 0.05]]],
        [3, "<6>", None, [["<9>", 0.4], ["<8>", 0.3], ["<9>", 0.2]]],
    ]


def test_no_piece_is_large():
    """The event loop runs between two pieces."""
    at = np.arange(100_000)
    frame = Frame(
        1,
        1,
        1,
        at,
        at < 0,
        at >= 0,
        at % 7,
        np.full(len(at), 0.5),
        at * 0 + 1,
        np.ones(7),
        np.ones((2, len(at))),
        Guesses.build(at, at % 7, np.full(len(at), 0.5), np.ones((2, 4, len(at)))),
    )
    pieces = list(json_slices(frame, 0, dict.fromkeys(range(7), "text")))
    assert len(json.loads(b"".join(pieces))["guesses"]) == len(at)
    assert max(map(len, pieces)) < 200 * frames_of_steps.SLICE


def test_text_is_made_in_pieces():
    from vllm_dlm.view import observed

    made, others = [], []

    async def other() -> None:
        while len(made) < 5000:
            others.append(len(made))
            await asyncio.sleep(0)

    async def both() -> None:
        text = observed.texts(lambda token: made.append(token) or str(token), list(range(5000)))
        await asyncio.gather(text, other())

    asyncio.run(both())
    assert len(others) >= 5000 // observed.SLICE - 1
