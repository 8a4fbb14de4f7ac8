"""Which requests for scores are refused before they cost anything."""

import asyncio
import json
import random

import pytest

from tests.integration.counting_engine import CONTEXT, LONGEST, processor, raw, serve, served
from vllm_dlm.scoring import body

__all__ = ["processor", "serve", "served"]  # fixtures


@pytest.mark.parametrize(
    "field, limit, fields",
    [
        ("continuation", "score_pairs", {"context": CONTEXT, "continuation": [" a"] * 10_000}),
        ("context", "score_pairs", {"context": [[5]] * 1025, "continuation": [6]}),
        ("context and continuation", "score_characters", {"context": CONTEXT, "continuation": [" a"] * 100}),
        ("context and continuation", "score_characters", {"context": [5] * (1 << 20), "continuation": [6]}),
        ("mc_num", "score_draws", {"context": CONTEXT, "continuation": " a", "mc_num": 1 << 15}),
        ("mc_num", "score_draws", {"context": [5], "continuation": [[6]] * 129}),
        ("body", "score_pairs", {"context": [[5]] * 100_000, "continuation": [6]}),
        ("body", "score_pairs", {f"field {index}": index for index in range(20_000)}),
        ("body", "score_pairs", {"context": {"a": [{}] * 20_000}, "continuation": [6]}),
        ("body", "score_characters", {"context": [5] * (1 << 22), "continuation": [6]}),
        ("body", "score_characters", {"context": "a" * (17 << 20), "continuation": [6]}),
    ],
)
def test_what_exceeds_a_limit_is_not_encoded(served, field, limit, fields):
    served.refused(field, f"--dlm-config limits.{limit}", **fields)
    assert not served.tokenizer.lengths and not served.engine.started


def test_a_body_that_exceeds_the_limits_far_is_not_parsed(served, monkeypatch):
    monkeypatch.setattr(body, "from_json", lambda _: pytest.fail("parsed"))
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    for content in (
        b'{"context":[' + b"[5]," * 2_500_000 + b'[5]],"continuation":[6]}',
        b'{"context":[' + b"5," * 5_000_000 + b'5],"continuation":[6]}',
        b'{"context":[' + b'"",' * 3_333_333 + b'""]}',
        b"{" + b",".join(b'"k%07d":0' % index for index in range(700_000)) + b"}",
        b'{"context":' + b"[" * 10_000_000,
        b'{"context":[' + b"{}," * 3_333_333 + b"{}]}",
    ):
        response = asyncio.run(raw(served, content))
        assert response == 400


def test_brackets_and_commas_of_texts_do_not_count():
    rng = random.Random(0)
    for _ in range(2000):
        texts = ["".join(rng.choices('\\"[]{},aé\n', k=rng.randrange(8))) for _ in range(rng.randint(1, 4))]
        for ascii_only in (True, False):
            content = json.dumps({"context": texts, "continuation": [[5, 6]]}, ensure_ascii=ascii_only).encode()
            wanted = {"lists and objects": 4, "texts": len(texts) + 2, "values": len(texts) + 1}
            for slice_bytes in (1, 2, 3, 7, 1 << 18):
                *_, found = body.structure(content, slice_bytes)
                assert found == wanted, content


def test_a_text_that_cannot_fit_is_not_encoded(serve):
    """vLLM's own bound on the characters of a prompt"""
    served = serve(score_characters=1 << 30)
    most = LONGEST * served.tokenizer.max_chars_per_token
    served.refused("context", f"{most + 1} characters", context="a" * (most + 1), continuation=[5])
    assert not served.tokenizer.lengths
    served.refused("context", f"{LONGEST} tokens", context=" a" * (LONGEST + 1), continuation=[5])
    assert len(served.tokenizer.lengths) == 1


@pytest.mark.parametrize(
    "field, fields",
    [
        ("context", {"context": [5, "a"], "continuation": [6]}),
        ("context", {"context": [[5, True]], "continuation": [6]}),
        ("context", {"context": [[5], [[5]]], "continuation": [6]}),
        ("continuation", {"context": [5], "continuation": [6, 1.5]}),
        ("continuation", {"context": [5], "continuation": [1 << 70]}),
        ("continuation", {"context": [5], "continuation": [5] * 20 + [-1]}),
        ("context and continuation", {"context": [5] * LONGEST, "continuation": [6]}),
        ("body.priority", {"context": [5], "continuation": [6], "priority": 1 << 63}),
        ("body.priority", {"context": [5], "continuation": [6], "priority": "high"}),
        ("body.continuation", {"context": [5]}),
        ("other", {"context": [5], "continuation": [6], "other": [[[5] * 1000] * 100]}),
    ],
)
def test_bad_input_is_named(served, field, fields):
    served.refused(field, field.removeprefix("body."), **fields)
    assert not served.engine.started


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b'{"context": ', b"\xff", b"[" * 1000, b'{"context": "\\ud800"}']
)
def test_what_is_no_object_is_refused(served, content):
    served.refused("body", "it must be a JSON object", content=content)
