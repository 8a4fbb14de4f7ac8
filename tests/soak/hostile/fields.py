"""Rows of vLLM's own fields, of bodies and headers: what this package must not make more expensive than it is."""

import json
from collections.abc import Callable, Iterator

from tests.soak.bodies import JSON
from tests.soak.hostile.rows import (
    ANSWERED,
    AT_ONCE,
    CHAT,
    COMPLETIONS,
    LEGAL,
    REFUSED,
    Make,
    Message,
    Row,
    Target,
    completion,
    posted,
    with_options,
)

MOST_LOGPROBS = 20  # vLLM's default of --max-logprobs
MOST_SAMPLES = 16_384  # vLLM's VLLM_MAX_N_SEQUENCES
DRAWN = {"temperature": 1.0, "seed": 7}


def rows(target: Target) -> Iterator[Row]:
    yield from controls(target)
    yield from sampling(target)
    yield from bodies(target)


def sampling(target: Target) -> Iterator[Row]:
    def row(name: str, expected=REFUSED, extra: dict | None = None, **fields) -> Row:
        long = fields.pop("long", False)
        return Row("field", name, completion(extra=extra, **fields), expected, long=long)

    longest = target.room
    yield row("n, 64", LEGAL, n=64, **DRAWN)
    yield row("n, one above", n=MOST_SAMPLES + 1, **DRAWN)
    yield row("n, absurd", n=1 << 62, **DRAWN)
    yield row("logprobs, largest, on the longest canvas", LEGAL, AT_ONCE, logprobs=MOST_LOGPROBS, max_tokens=longest)
    yield row("logprobs, one above", logprobs=MOST_LOGPROBS + 1)
    yield row("logprobs, absurd", logprobs=1 << 62)
    yield row("max_tokens, largest", LEGAL, AT_ONCE, max_tokens=longest)
    yield row(
        "max_tokens, one above",
        ANSWERED if target.server.canvas.max is None else REFUSED,
        AT_ONCE,
        max_tokens=longest + 1,
    )
    yield row("max_tokens, absurd", max_tokens=10**4000)
    yield row("ten samples of the longest canvas", LEGAL, AT_ONCE, n=10, max_tokens=longest, long=True, **DRAWN)
    yield row("top_k, absurd", ANSWERED, top_k=1 << 62, **DRAWN)
    yield row("stop_token_ids, 100,000", ANSWERED, stop_token_ids=[6] * 100_000)
    yield row("stop_token_ids above the vocabulary", stop_token_ids=[target.vocab_size])
    yield row("seed, absurd", temperature=1.0, seed=1 << 70)
    yield row("an empty prompt", prompt=[])
    yield Row("field", "100 prompts", prompts(100), LEGAL, long=True)
    yield Row("field", "flood of plain requests", completion(), LEGAL, target.flood)
    longest_prompt = completion(prompt=[5] * (target.max_model_len - 1), max_tokens=1)
    yield Row("field", "flood of the longest prompts", longest_prompt, LEGAL, target.flood, long=True)
    yield row("a prompt of masks alone", ANSWERED, AT_ONCE, prompt=[target.mask_id] * 200)
    for name, keys in (
        ("10,000 unknown keys", {f"key{each}": 1 for each in range(10_000)}),
        ("10,000 unknown keys with dlm_", {f"dlm_key{each}": 1 for each in range(10_000)}),
        ("a key of 10 MB", {"dlm_" + "z" * target.large: 1}),
        ("100 kB of lists", {"dlm_steps": [[]] * (target.large // 400)}),
    ):
        like = "lists" if "lists" in name else "text" if "MB" in name else "keys"
        yield Row("field", f"vllm_xargs, {name}", with_options(keys), REFUSED, like=like)
    yield Row(
        "field",
        "10,000 dlm_ fields next to vllm_xargs",
        lambda t, n: posted(COMPLETIONS, t.body(n) | {f"dlm_key{each}": n for each in range(10_000)}),
        REFUSED,
    )


def bodies(target: Target) -> Iterator[Row]:
    def body(name: str, make, expected=REFUSED, headers: dict | None = None, **more) -> Row:
        def message(t: Target, n: int) -> Message:
            data = make(t, n)
            data = data if isinstance(data, bytes) else data.encode(errors="surrogatepass")
            return Message(COMPLETIONS, data, JSON if headers is None else headers)

        return Row("body", name, message, expected, **more)

    def inside(t: Target, n: int, value: str) -> str:
        """`value` as an option, written as it is"""
        return json.dumps(t.body(n, extra={"dlm_steps": "HERE"})).replace('"HERE"', value)

    deep = 100_000
    yield body("100,000 nested arrays in an option", lambda t, n: inside(t, n, "[" * deep + "]" * deep))
    yield body("100,000 nested objects in an option", lambda t, n: inside(t, n, '{"a":' * deep + "1" + "}" * deep))
    yield body("500 nested arrays in an option", lambda t, n: inside(t, n, "[" * 500 + "]" * 500))
    yield body("10 MB of arrays in an option", lambda t, n: inside(t, n, "[" * t.large), like="nested")
    yield body("a number of 4,000 digits", lambda t, n: inside(t, n, "9" * 4000))
    yield body("a number of 10 MB", lambda t, n: inside(t, n, "9" * t.large), like="digits")
    yield body("NaN", lambda t, n: inside(t, n, "NaN"))
    yield body("Infinity", lambda t, n: inside(t, n, "1e999"))
    yield body(
        "one option 10,000 times",
        lambda t, n: json.dumps(t.body(n, extra={"x": 1})).replace(
            '"x": 1', ", ".join(f'"dlm_steps": {each}' for each in range(4, 10_004))
        ),
        ANSWERED,
    )
    yield body("a lone surrogate as a key", lambda t, n: json.dumps(t.body(n, extra={"dlm_\ud800": 1})))
    yield body("a lone surrogate as a value", lambda t, n: json.dumps(t.body(n, extra={"dlm_reuse": "\udfff"})))
    yield body("bytes that are no UTF-8", lambda t, n: b"\xff\xfe" + json.dumps(t.body(n)).encode("utf-16-le")[:-1])
    yield body("UTF-16", lambda t, n: json.dumps(t.body(n)).encode("utf-16"), ANSWERED)
    yield body("10 MB that are no JSON", lambda t, n: b"\x00" * t.large)
    yield body("an empty body", lambda t, n: b"")
    yield body("another content type", lambda t, n: json.dumps(t.body(n)), headers={"Content-Type": "image/png"})
    huge = JSON | {"X-Request-Id": "x" * 60_000}
    yield body("an X-Request-Id of 60 kB", lambda t, n: json.dumps(t.body(n)), ANSWERED, huge)
    yield body(
        "an X-Request-Id with quotes and markup",
        lambda t, n: json.dumps(t.body(n, extra={"dlm_frames": 1}, stream=True)),
        LEGAL,
        JSON | {"X-Request-Id": "<script>'\"{}.0.1/../%00"},
    )


def controls(target: Target) -> Iterator[Row]:
    """Bodies of each shape without a field of this package: in vllm_xargs, under a name that nothing reads"""

    def row(like: str, name: str, make, expected=REFUSED, **more) -> Row:
        return Row("control", name, make, expected, control=True, like=like, **more)

    def unread(value: Callable[[], object], **more) -> Make:
        return lambda t, n: with_options({"nothing": value(), "number": n}, **more)(t, n)

    text, large = target.text(target.large, 0), target.large
    yield row("text", "10 MB of text", unread(lambda: text))
    # A hundredth: vLLM describes each wrong element of vllm_xargs, which takes it minutes for 10 MB.
    yield row("lists", "100 kB of lists", unread(lambda: [[]] * (large // 400)))
    # The worst case is that two bodies are parsed one after the other without a probe between them.
    for attempt in ("once", "again", "a third time"):
        yield row("ids", f"10 MB of token ids, {attempt}", unread(lambda: [5] * (large // 3)))
    yield row("strings", "10 MB of short texts", unread(lambda: ["a12"] * (large // 7)))
    yield row("keys", "10,000 keys", with_options({f"key{each}": 1 for each in range(10_000)}))
    yield row("digits", "a number of 10 MB", lambda t, n: Message(COMPLETIONS, b'{"prompt": ' + b"9" * t.large + b"}"))
    yield row("nested", "10 MB of nested arrays", lambda t, n: Message(COMPLETIONS, b"[" * t.large))
    yield row(
        "messages",
        "a chat with 10,000 messages",
        lambda t, n: posted(
            CHAT,
            {
                "model": t.model,
                "max_tokens": 1,
                "messages": [{"role": "user", "content": f"a{n}"}] * 10_000,
            },
        ),
        ANSWERED,
    )
    yield row("stops", "stop, 10,000 strings", completion(stop=[f"qz{each}" for each in range(10_000)]), ANSWERED)
    yield row("", "10 MB of text as a prompt", completion(prompt=text))
    yield row("", "10 MB of token ids as a prompt", completion(prompt=[5] * (large // 3)))
    yield row("flood of text", "flood of 1 MB texts", unread(lambda: text[: large // 10]), clients=target.flood)
    yield row("", "1,000 prompts", prompts(1000), LEGAL, long=True)


def prompts(count: int) -> Make:
    return completion(prompt=[[5, each % 400] for each in range(count)], max_tokens=1)
