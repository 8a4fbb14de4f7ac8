"""`vllm serve --dlm-config` for an autoregressive model, in a separate process and with speculative decoding."""

import json

import httpx
import pytest

from tests.integration.serving import serving
from tests.page_sparse.conftest import SPARSE, decode, prompts, tokens
from tests.page_sparse.models import SHAPE
from tests.word_tokenizer import write_tokenizer

pytestmark = pytest.mark.slow  # a server of its own

ASKED = prompts(300, 77, 180, seed=1)
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoints):
    folder, vocabulary = checkpoints("qwen2"), SHAPE["vocab_size"]
    write_tokenizer(vocabulary, folder)
    arguments = (
        *("--dtype", "float32", "--max-model-len", "1024", "--block-size", "32", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(1 << 24), "--served-model-name", "model"),
        *("--speculative-config", json.dumps(DRAFTS)),
        *("--dlm-config", json.dumps({"selection": SPARSE})),
    )
    with serving(tmp_path_factory.mktemp("server") / "log.txt", *arguments, checkpoint=folder) as server:
        yield server


def complete(server, prompt, **fields):
    body = {"model": "model", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True} | fields
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)


def test_drafts_are_what_would_have_been_decoded(server, decoder):
    """Each draft position chooses its own pages."""
    plain = decoder("qwen2", SPARSE, enable_prefix_caching=False, max_num_batched_tokens=2048)
    answers = complete(server, ASKED, return_token_ids=True).json()["choices"]
    assert [answer["token_ids"] for answer in answers] == tokens(decode(plain, ASKED, new=40))
    metrics = server.metrics()
    assert metrics["vllm:spec_decode_num_draft_tokens_total"] > 0
    # more positions than tokens, because of rejected draft tokens
    rows = metrics["vllm:sparse_attention_rows_total"] + metrics["vllm:sparse_attention_dense_rows_total"]
    assert rows > 3 * len(ASKED) * 39
    assert (
        0 < metrics["vllm:sparse_attention_pages_read_total"] < 0.6 * metrics["vllm:sparse_attention_pages_dense_total"]
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field, value", [("dlm_steps", 4), ("dlm_selection", "none"), ("dlm_nonsense", 1)])
def test_options_of_requests_are_refused(server, stream, field, value):
    for misplaced in ({"vllm_xargs": {field: value}}, {field: value}):
        answer = complete(server, ASKED[0], stream=stream, **misplaced)
        assert answer.status_code == 400 and field in answer.text
