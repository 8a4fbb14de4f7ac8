"""A selection that is no part of this package, in both engines: loaded through its entry point, held to what the
package's own selections are held to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.running import tokens as canvas_tokens
from tests.engine.selecting import assert_batch_invariant, assert_keeping_all_is_dense, engine, requests
from tests.external.distribution import installed
from tests.page_sparse.conftest import counted, decode, prompts, selecting, tokens
from tests.page_sparse.reference import Reference
from tests.plugins.asking import canvas_asks
from vllm_dlm.methods import methods

ROOT = Path(__file__).resolve().parents[2]
#: pages of 16, of which four are read
FIELDS = {"page_size": 16, "budget_tokens": 64, "min_context": 0}
QUEST = {"name": "quest"} | FIELDS
ASKED = prompts(300, 77, 180)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("distribution"), {"quest": "quest_pages:Quest"}) as environment:
        yield environment


@pytest.fixture
def quest():
    return methods("selection")["quest"]


def bound(q, page):
    """q [..., D], the keys of a page [P, D] -> [...]"""
    q, low, high = q.double(), page.double().amin(0), page.double().amax(0)
    return torch.maximum(q * low, q * high).sum(-1)


# -- a canvas ------------------------------------------------------------------------------


def test_a_canvas_reads_the_pages_of_the_highest_bound(quest):
    g = torch.Generator().manual_seed(0)
    keys, q = torch.randn(20 * 16 + 3, 2, 32, generator=g), torch.randn(5, 6, 32, generator=g)
    selection = quest(**FIELDS | {"budget_tokens": 96})
    got = selection.choose(canvas_asks(selection, q, keys)).units[0]
    for head in range(2):
        rows = q[:, 3 * head : 3 * head + 3].flatten(0, 1)
        scores = torch.stack([bound(rows, keys[16 * i : 16 * i + 16, head]).max() for i in range(20)])
        scores[[0, 19]] = torch.inf  # the prompt's end is a page and a bit: one recent page lies beyond the whole ones
        assert torch.equal(got[head].long(), scores.topk(6)[1].sort()[0])


def test_a_needle_is_found(quest):
    """One key of a page points along the query, the others against it: what a mean hides a bound shows."""
    g = torch.Generator().manual_seed(0)
    keys, q = 0.01 * torch.randn(20 * 16, 1, 8, generator=g), torch.zeros(1, 1, 8)
    q[..., 0] = 8.0
    keys[112:128, 0, 0], keys[120, 0, 0] = -0.2, 3.0
    selection = quest(**FIELDS)
    assert 7 in selection.choose(canvas_asks(selection, q, keys)).units[0, 0]


def test_canvases_of_a_batch_are_what_they_are_alone(engines):
    assert_batch_invariant(engine(engines, "llada-tiny-gqa", QUEST | {"dense_layers": []}))


def test_keeping_all_pages_of_a_canvas_is_dense(engines, quest, monkeypatch):
    all_pages = QUEST | {"budget_tokens": 4096, "dense_layers": []}
    assert_keeping_all_is_dense(engines, "llada-tiny", all_pages, quest, monkeypatch)


def test_a_request_asks_for_it_by_name(engines):
    """Of a server with UNIQUE, whose fields both have: other scores, other pages, other tokens."""
    llm = engine(engines, "llada-tiny", {"name": "unique", "dense_layers": []} | FIELDS)
    runs = {}
    for name in ("quest", "unique", "none"):
        given = list(requests(6))
        for _, params in given:
            params.temperature = 0.0
            params.extra_args |= {"dlm_selection": name, "dlm_reuse": "fast_dllm"}
        runs[name] = canvas_tokens(llm, given)
    assert runs["none"] == canvas_tokens(engines("llada-tiny"), given)
    assert runs["quest"] not in (runs["unique"], runs["none"])


# -- generated positions -------------------------------------------------------------------


class QuestReference(Reference):
    def score(self, queries, page):
        return bound(queries, page)


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_every_page_of_a_decoder_is_vllm(decoder, model):
    want = tokens(decode(decoder(model), ASKED))
    with selecting(decoder(model, QUEST | {"dense_layers": [0]}), budget_tokens=4096) as llm:
        assert tokens(decode(llm, ASKED)) == want


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_chosen_pages_of_a_decoder_are_the_reference(decoder, checkpoints, model):
    llm = decoder(model, QUEST | {"dense_layers": [0]})
    llm.reset_prefix_cache()
    before = counted(llm)
    got = decode(llm, ASKED)
    counts = counted(llm, before)
    assert counts["dense_rows"] == 0 and counts["pages_read"] < counts["pages_seen"] / 2
    reference = QuestReference(checkpoints(model), dense_layers=(0,), **FIELDS)
    for prompt, run in zip(ASKED, got, strict=True):
        want, logprobs, left_out = reference.generate(prompt, len(run))
        assert left_out > 0
        assert [token for token, _ in run] == want
        assert [logprob for _, logprob in run] == pytest.approx(logprobs, abs=2e-4)


def test_texts_of_a_batch_are_what_they_are_alone(decoder):
    llm = decoder("llama", QUEST | {"dense_layers": [0]}, enable_prefix_caching=False, max_num_batched_tokens=2048)
    together = tokens(decode(llm, ASKED))
    assert [tokens(decode(llm, [ids]))[0] for ids in ASKED] == together


SCRIPT = """
import json, sys
from tests.page_sparse.conftest import decode, tokens

if __name__ == "__main__":
    from vllm import LLM

    folder, selection, asked = json.loads(sys.argv[1])
    llm = LLM(
        folder, dtype="float32", max_model_len=1024, block_size=32, enforce_eager=True, skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 24, additional_config={"dlm": {"selection": selection}},
    )
    print("tokens:", json.dumps(tokens(decode(llm, asked))))
"""


@pytest.mark.slow
def test_an_engine_in_processes_of_its_own_finds_it(decoder, checkpoints, environment, tmp_path):
    selection = QUEST | {"dense_layers": [0]}
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", json.dumps([str(checkpoints("llama")), selection, ASKED])],
        env=environment | {"PYTHONPATH": paths, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("tokens:")]
    assert json.loads(line.removeprefix("tokens:")) == tokens(decode(decoder("llama", selection), ASKED))
