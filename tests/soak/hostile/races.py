"""Two streams with one X-Request-Id, three samples and one, with frames: each client gets its own answer and frames."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.soak.hostile.acts import Outcome, Wire
from tests.soak.hostile.rows import COMPLETIONS, Target, posted
from vllm_dlm.view.frames import Replay

SECONDS = 60  # for one answer
#: seconds by which the second request comes later, in turn: the moment between check and admission is short
DELAYS = (0, 0, 0.001, 0.002, 0.004)


def race(wire: Wire, target: Target, number: int) -> list[str]:
    """-> what was wrong with either answer"""
    start = threading.Barrier(2)

    def one(samples: int) -> list[str]:
        extra = {"dlm_frames": 1}
        fields = {"n": samples, "temperature": 1.0, "seed": 10 * number + samples, "stream": True}
        body = target.body(
            10 * number + samples, extra, max_tokens=16, ignore_eos=True, return_token_ids=True, **fields
        )
        name = f"race-{target.seed}-{number}"
        raw = posted(COMPLETIONS, body, {"X-Request-Id": name} | target.headers).raw()
        start.wait(SECONDS)
        time.sleep(DELAYS[number % len(DELAYS)] * (samples == 1))
        outcome, answer = wire.ask(raw, time.monotonic() + SECONDS)
        return [f"race {number}, n {samples}: {why}" for why in wrong(outcome, answer, samples)]

    with ThreadPoolExecutor(2) as pool:
        return [why for found in pool.map(one, (3, 1)) for why in found]


def wrong(outcome: Outcome, answer: bytes, samples: int) -> list[str]:
    """What a stream lacks: its end, its tokens, and frames that fill in the same tokens."""
    if outcome.status != 200 or b"data: [DONE]" not in answer:
        return [f"status {outcome.status} {outcome.problem or ''}, {answer[-200:]!r}"]
    tokens: dict[int, list[int]] = {index: [] for index in range(samples)}
    replays = {index: Replay(0) for index in range(samples)}
    for line in answer.decode(errors="replace").splitlines():
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        frame = chunk.get("dlm") or {}
        if "set" in frame:
            choice = frame.get("choice", 0)
            if choice not in replays:
                return [f"a frame of choice {choice}"]
            replays[choice].apply(frame)
        for each in chunk.get("choices", []):
            tokens[each["index"]] += each.get("token_ids") or []
    found = []
    for index, ids in tokens.items():
        shown = [replays[index].filled.get(at, [at, None])[1] for at in range(len(ids))]
        if not ids or shown != ids:
            found.append(f"choice {index} got tokens {ids}, and its frames fill in {shown}")
    return found
