"""Bodies that a server must refuse, and some that are only odd: it may answer those or refuse them, but not fail."""

import json
import random

from tests.soak.requests import drawn_name

MODEL = "demo"
WRONG = ["x", -1, float("inf"), 1.5, [], {}, [[]], True, None, "NaN", 1 << 70, -(1 << 70), "", {"a": [1]}, ["a"]]
#: fields of a completion, each of which is given a value of every wrong type. Not structured_outputs: vLLM 0.32's own
#: request model calls `.get` on whatever stands there and answers 500 (completion and chat_completion/protocol.py).
FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "logprobs", "stop", "stop_token_ids", "ignore_eos",
    "stream", "vllm_xargs", "prompt", "model", "echo", "presence_penalty", "logit_bias", "stream_options",
    "response_format", "min_p", "min_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs", "use_beam_search",
    "user",
)  # fmt: skip
OPTIONS = (
    "dlm_steps",
    "dlm_block_length",
    "dlm_decoding",
    "dlm_reuse",
    "dlm_selection",
    "dlm_threshold",
    "dlm_factor",
    "dlm_cfg_scale",
    "dlm_suppress_eos",
    "dlm_eps",
    "dlm_algorithm_temperature",
    "dlm_nothing",
)
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/v1/embeddings",
)
JSON = {"Content-Type": "application/json"}


def plain(**fields) -> dict:
    return {"model": MODEL, "prompt": "Copy: a b", "max_tokens": 4, **fields}


def refused(rng: random.Random, limit: int, vocab_size: int) -> tuple[str, bytes, dict]:
    """(path, body, headers) that no server may answer with 200. `limit`: the longest canvas."""
    good = json.dumps(plain()).encode()
    too_long = [5] * rng.choice((limit, limit + 1, 4 * limit))
    cases = [
        lambda: plain(prompt=too_long),
        lambda: plain(prompt=[1, vocab_size + rng.randrange(1000)]),
        lambda: plain(prompt=[1, -1 - rng.randrange(1000)]),
        lambda: plain(prompt=[]),
        lambda: plain(max_tokens=rng.choice((-1, -(1 << 40)))),
        lambda: plain(temperature=rng.choice((-1, "hot", [0], float("nan"), float("inf")))),
        lambda: plain(vllm_xargs={rng.choice(OPTIONS): rng.choice(({}, [], "much", -5, float("nan"), [[1]]))}),
        lambda: plain(vllm_xargs={"dlm_steps": rng.choice((0, -1, 2.5, 1 << 60))}),
        lambda: plain(vllm_xargs={"dlm_reuse": drawn_name(rng, "reuse") + "x"}),
        lambda: plain(stop_token_ids=[rng.choice((-1, vocab_size, 1 << 40))]),
        lambda: plain(model="another"),
        lambda: plain(frequency_penalty=1.0),
        lambda: [plain()],
        lambda: rng.choice(([], "text", 5, None)),
        lambda: good[: rng.randrange(1, len(good))],
        lambda: good + b"}",
        lambda: bytes(rng.randrange(256) for _ in range(200)),
        lambda: b"",
    ]
    case = rng.choice(cases)()
    headers = JSON
    if rng.random() < 0.1:
        case, headers = (
            good,
            {"Content-Type": rng.choice(("text/plain", "multipart/form-data", "application/xml", "image/png"))},
        )
    return "/v1/completions", case if isinstance(case, bytes) else json.dumps(case).encode(), headers


def odd(rng: random.Random, limit: int, mask_id: int) -> tuple[str, bytes, dict]:
    room = rng.choice((1, 2, 5))
    cases = [
        lambda: ("/v1/completions", plain(**{rng.choice(FIELDS): rng.choice(WRONG)})),
        lambda: ("/v1/completions", plain(vllm_xargs={rng.choice(OPTIONS): rng.choice(WRONG)})),
        lambda: (rng.choice(PATHS), rng.choice(WRONG)),
        lambda: (
            rng.choice(PATHS),
            {rng.choice((*FIELDS, "messages", "input")): rng.choice(WRONG), "model": MODEL},
        ),
        lambda: ("/v1/completions", plain(prompt=[5] * (limit - room), max_tokens=room)),
        lambda: ("/v1/completions", plain(prompt=[5] * (limit - room), max_tokens=room + 1)),
        lambda: ("/v1/completions", plain(prompt=[mask_id] * rng.randrange(1, 30))),
        lambda: ("/v1/completions", plain(prompt=["a"] * rng.randrange(2, 6))),
        lambda: ("/v1/completions", plain(prompt="<|mdm_mask|>" * rng.randrange(1, 30))),
        lambda: ("/v1/completions", plain(prompt="\udcff\u0000\U0001f600" * 3, max_tokens=2)),
        lambda: ("/v1/completions", plain(seed=-(1 << 63), temperature=1)),
        lambda: (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"role": "user", "content": rng.choice(WRONG)}]},
        ),
        lambda: (
            "/v1/responses",
            {"model": MODEL, "input": "Copy: a", "stream": True, "vllm_xargs": {"dlm_steps": "x"}},
        ),
        lambda: ("/v1/completions", plain(dlm_steps=4, steps=4)),
    ]
    path, body = rng.choice(cases)()
    return path, json.dumps(body).encode(), JSON


def large(rng: random.Random, size: int = 10 << 20) -> tuple[str, bytes, dict]:
    """10 MB, in the place of different things."""
    text = "a" * size
    body = rng.choice(
        (
            plain(prompt=text),
            plain(vllm_xargs={"dlm_steps": text}),
            plain(vllm_xargs={"dlm_reuse": text}),
            plain(model=text),
            plain(temperature=text),
            plain(max_tokens=int("9" * 4000)),
            plain(prompt=[5] * (size // 10)),
            plain(stop=[text]),
            {**plain(), text: 1},
            text,
            [[]] * (size // 4),
        )
    )
    return "/v1/completions", json.dumps(body).encode(), JSON
