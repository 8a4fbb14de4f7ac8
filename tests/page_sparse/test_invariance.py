"""Output does not depend on the batch, chunked prefill, cached prefixes or preemption. (test_server.py tests
speculative decoding, because no other engine can follow one with it in the same process.)"""

import pytest

from tests.page_sparse.conftest import SPARSE, counted, decode, prompts, tokens

ASKED = prompts(300, 77, 180, 260, 33, seed=1)


@pytest.fixture(scope="module")
def plain(decoder):
    """No chunked prefill, no cached prefixes, enough blocks for all requests."""
    return decoder("qwen2", SPARSE, enable_prefix_caching=False, max_num_batched_tokens=2048)


@pytest.fixture(scope="module")
def want(plain):
    return tokens(decode(plain, ASKED, new=40))


def test_alone_as_in_a_batch(plain, want):
    assert [tokens(decode(plain, [ids], new=40))[0] for ids in ASKED] == want


@pytest.mark.parametrize("budget", [48, 129])
def test_chunks(decoder, want, budget):
    chunked = decoder("qwen2", SPARSE, enable_prefix_caching=False, max_num_batched_tokens=budget, max_num_seqs=4)
    assert tokens(decode(chunked, ASKED, new=40)) == want


def test_cached_prefixes(decoder, want):
    cached = decoder("qwen2", SPARSE)
    assert tokens(decode(cached, ASKED, new=40)) == want
    before = counted(cached)
    for _ in range(2):
        assert tokens(decode(cached, ASKED, new=40)) == want
    counts = counted(cached, before)
    assert counts["sparse_rows"] > 4 * counts["dense_rows"] and counts["pages_read"] < 0.6 * counts["pages_seen"]


def test_a_prefix_shared_by_two(decoder, plain):
    """The second request reads pages that the first one has summarized."""
    cached = decoder("qwen2", SPARSE)
    shared, ends = prompts(256, seed=2)[0], prompts(40, 40, seed=3)
    asked = [shared + end for end in ends]
    assert tokens([decode(cached, [ids])[0] for ids in asked]) == tokens(decode(plain, asked))


def test_reused_blocks_forget_what_they_held(decoder, plain):
    """A cache with few blocks is overwritten repeatedly."""
    small = decoder("qwen2", SPARSE, max_model_len=352, num_gpu_blocks_override=14)
    for seed in range(4, 8):
        asked = prompts(200, 150, seed=seed)
        assert tokens([decode(small, [ids])[0] for ids in asked]) == tokens(decode(plain, asked))


def test_preemption(decoder, want):
    """With too few blocks, requests are preempted. Their generated positions are recomputed with the same sparsity.
    Also tests the metrics of this."""
    llm = decoder(
        "qwen2",
        SPARSE,
        max_model_len=352,
        num_gpu_blocks_override=21,
        disable_log_stats=False,
        enable_prefix_caching=False,
    )
    assert tokens(decode(llm, ASKED, new=40)) == want
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert metrics["vllm:num_preemptions"] > 0
    counts = counted(llm)
    names = {"rows": "sparse_rows", "dense_rows": "dense_rows", "pages_read": "pages_read", "pages_dense": "pages_seen"}
    assert {ours: metrics[f"vllm:sparse_attention_{theirs}"] for theirs, ours in names.items()} == counts
