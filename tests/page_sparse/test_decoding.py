"""Decoding of four families: equal to vLLM if everything is read, and to the reference if pages are chosen."""

import pytest

from tests.page_sparse.conftest import SPARSE, counted, decode, prompts, selecting, tokens
from tests.page_sparse.models import CONFIGS
from tests.page_sparse.reference import Reference

ASKED = prompts(300, 77, 180)


@pytest.mark.parametrize("model", CONFIGS)
def test_every_page_is_vllm(decoder, model):
    want = tokens(decode(decoder(model), ASKED))
    with selecting(decoder(model, SPARSE), budget_tokens=4096) as llm:
        assert tokens(decode(llm, ASKED)) == want


@pytest.mark.parametrize("model", CONFIGS)
def test_chosen_pages_are_the_reference(decoder, checkpoints, model):
    llm = decoder(model, SPARSE)
    llm.reset_prefix_cache()
    before = counted(llm)
    got = decode(llm, ASKED)
    counts = counted(llm, before)
    assert counts["dense_rows"] == 0 and counts["pages_read"] < counts["pages_seen"] / 2
    reference = Reference(checkpoints(model), page_size=16, budget_tokens=64, dense_layers=(0,))
    for prompt, run in zip(ASKED, got, strict=True):
        want, logprobs, left_out = reference.generate(prompt, len(run))
        assert left_out > 0
        assert [token for token, _ in run] == want
        assert [logprob for _, logprob in run] == pytest.approx(logprobs, abs=2e-4)


def test_it_differs_from_dense(decoder):
    """If it did not, the test above would be meaningless."""
    assert tokens(decode(decoder("llama", SPARSE), ASKED)) != tokens(decode(decoder("llama"), ASKED))


def test_other_scores(decoder):
    """Checks that the fields take effect; the kernels' tests check their meaning."""
    llm = decoder("llama", SPARSE)
    texts = [tokens(decode(llm, ASKED))]
    for fields in ({"reduce": "mean"}, {"lam": 4.0}, {"sink_pages": 0, "recent_pages": 1}, {"budget_tokens": 96}):
        with selecting(llm, **fields):
            texts.append(tokens(decode(llm, ASKED)))
    assert len({str(text) for text in texts}) == len(texts)


def test_a_spread_per_channel(decoder):
    llm = decoder("llama", SPARSE | {"std_kind": "vector"}, block_size=128)
    assert tokens(decode(llm, ASKED)) != tokens(decode(decoder("llama", SPARSE), ASKED))
    assert counted(llm)["sparse_rows"] > 0


def test_all_pages_are_dense_bit_for_bit(decoder):
    """With a budget of all pages, or a context below the minimum, the same kernel reads everything."""
    runs = []
    for fields in ({"budget_tokens": 4096}, {"min_context": 100_000}):
        with selecting(decoder("qwen2", SPARSE), **fields) as llm:
            llm.reset_prefix_cache()  # prefilling a whole prompt rounds differently from prefilling its end
            before = counted(llm)
            runs.append(decode(llm, ASKED))
            counts = counted(llm, before)
            assert counts["sparse_rows"] == 0 and counts["pages_read"] == counts["pages_seen"] > 0
    assert runs[0] == runs[1]


def test_min_context_is_counted_per_position(decoder):
    with selecting(decoder("qwen2", SPARSE), min_context=190) as llm:
        before = counted(llm)
        decode(llm, prompts(180), new=21)  # positions 180 … 199 are decoded, and see 181 … 200 keys
        counts = counted(llm, before)
    assert (counts["dense_rows"], counts["sparse_rows"]) == (3 * 9, 3 * 11)


def test_layers_with_a_window_keep_it(decoder):
    """Their blocks and those of the choosing layers are in one pool."""
    selection = SPARSE | {"dense_layers": []}
    llm = decoder("olmo3", selection, enable_prefix_caching=False)
    with selecting(llm, budget_tokens=4096):
        assert tokens(decode(llm, ASKED)) == tokens(decode(decoder("olmo3"), ASKED))
    before = counted(llm)
    assert tokens(decode(llm, ASKED)) == tokens(decode(llm, ASKED)) != tokens(decode(decoder("olmo3"), ASKED))
    assert counted(llm, before)["sparse_rows"] == 2 * 2 * len(ASKED) * 23  # two of eight layers, decoded twice
