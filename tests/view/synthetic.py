"""Frames as an engine sends them, of a text that is known: every kind of thing that can happen to a token."""

import random
from typing import Any

EVIL = "</script><img src=x onerror=alert(1)>"
WORDS = [
    "The", " sky", " is", " blue", " because", " air", " scatters", " short", " waves", " of", " light", " more",
    " than", " long", " ones", ".", "\n", "At", " sunset", " the", " path", " through", " the", " air", " is",
    " longer", ",", "\n", "so", " red", " is", " left", ".", EVIL, "<|eot_id|>",
]  # fmt: skip
LAYERS, PROMPT, BLOCK = 4, 24, 12
OTHERS = [[" maybe", 0.1], ["<b>", 0.05], [" also", 0.01]]  # of every guess
HOLE = -3  # of a prompt that has one


def begin(canvas: int, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "request": "chatcmpl-1",
        "model": "mock",
        "prompt_tokens": PROMPT,
        "canvas": canvas,
        "block_length": BLOCK,
        "reuse": options.get("dlm_reuse", "none"),
        "selection": options.get("dlm_selection", "none"),
        "decoding": options.get("dlm_decoding", "low_confidence"),
        "extent": "full",
        "layers": LAYERS,
        "page_size": 16 if "dlm_selection" in options else None,
        "prompt": [[f" p{position}"] for position in range(PROMPT)],
        "given": [[2, 13, " truly"]],
    }


def frames(canvas: int, options: dict[str, Any], seed: int = 1) -> list[dict[str, Any]]:
    """begin, one frame per step, end"""
    rng = random.Random(seed)
    text = [WORDS[i % len(WORDS)] for i in range(canvas)]
    if options.get("dlm_reuse", "none") != "none":
        text[5], text[9] = " because", " from"
    per_step = 3 if "dlm_threshold" in options else 1
    masked = [i for i in range(canvas) if i != 2]
    if "dlm_infill" in options:
        masked = [HOLE, *masked]
    out: list[dict[str, Any]] = [{"begin": begin(canvas, options)}]
    step = 0
    again = 0
    while masked:
        step += 1
        first = max(0, masked[0] // BLOCK)
        candidates = [i for i in masked if max(0, i // BLOCK) == first]
        chosen = sorted(rng.sample(candidates, min(per_step, len(candidates))))
        frame: dict[str, Any] = {"step": step, "steps": 1, "ms": 20.0 / per_step**0.5, "requests": 1, "block": first}
        frame["set"] = [[i, 100 + i, text[i], round(rng.uniform(0.6, 0.999), 3), step] for i in chosen]
        masked = [i for i in masked if i not in chosen]
        if options.get("dlm_decoding") == "wino" and step == 4:
            frame["unset"] = [[again, step]]
            masked = sorted([*masked, again])
        if step == 5:
            frame["edited"] = [[again, 999, " edited", 0.77, step]]
        again = chosen[0]
        frame["guesses"] = [
            [
                i,
                text[i],
                None if i == 7 else round(rng.uniform(0.1, 0.9), 3),
                OTHERS,
            ]
            for i in masked
            if max(0, i // BLOCK) == first
        ]
        whole, rows = PROMPT + canvas, heat(canvas, first, step, options)
        recomputed = sum((last - start + 1) * share * LAYERS for start, last, share in rows)
        frame["rows"] = {"live": whole * LAYERS, "recomputed": round(recomputed), "dense": whole * LAYERS}
        pages = [[-PROMPT, -9, 0.5], [-8, 7, 1.0]] if "dlm_selection" in options else []
        read = sum((last - start + 1) * share for start, last, share in pages) if pages else whole
        frame["keys"] = {"read": round(read * LAYERS), "of": whole * LAYERS}
        frame["heat"] = {"rows": rows, "pages": pages}
        out.append(frame)
    seconds = sum(frame.get("ms", 0) for frame in out) / 1000
    out.append({"end": {"steps": step, "seconds": seconds, "tokens": canvas, "finish_reason": "stop"}})
    return out


def heat(canvas: int, block: int, step: int, options: dict[str, Any]) -> list[list[float]]:
    if options.get("dlm_reuse", "none") == "none" or step % 8 == 1:
        return [[-PROMPT, canvas - 1, 1.0]]
    start = block * BLOCK
    end = min(start + BLOCK, canvas)
    return [[start, end - 1, 1.0], *([[end, canvas - 1, 0.25]] if end < canvas else [])]


def merged(frames: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """As a stream that is slower than its engine carries them; the first and the last frame stay alone."""
    out = []
    for start in range(1, len(frames) - 1, count):
        some = frames[start : start + count]
        some = [frame for frame in some if "end" not in frame]
        one = dict(some[-1])
        one["steps"], one["ms"] = len(some), sum(frame["ms"] for frame in some)
        for key in ("set", "unset", "edited"):
            one[key] = [entry for frame in some for entry in frame.get(key, [])]
        for key in ("rows", "keys"):
            one[key] = {name: sum(frame[key][name] for frame in some) for name in one[key]}
        out.append(one)
    return [frames[0], *out, frames[-1]]
