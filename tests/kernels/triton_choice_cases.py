"""Kernel features that only groups of canvases use, with Triton's interpreter and with torch, against the definitions;
run by test_triton_interpreter.py."""

import pytest
import torch

from tests.kernels.devices import on_gpu
from tests.kernels.interpreted import *  # noqa: F403
from tests.kernels.pages import PagedBatch, scored
from tests.kernels.triton_cases import choose
from tests.tiers import in_turn, pairwise, slow
from vllm_dlm.kernels.page_scores import REDUCTIONS, ScoringQueries, half_scores, page_scores
from vllm_dlm.kernels.page_scores import naive as naive_scores
from vllm_dlm.kernels.page_scores import triton as scores_of
from vllm_dlm.kernels.sparse_attention import naive as naive_attention
from vllm_dlm.kernels.sparse_attention import sparse_attention, sparse_delta
from vllm_dlm.kernels.sparse_attention import triton as attention
from vllm_dlm.kernels.top_pages import naive as naive_top
from vllm_dlm.kernels.top_pages import store_top_pages, top_pages, unless_alike

#: devices of the first argument
DEVICES = (on_gpu, lambda x: x)


def ragged(lens=(200, 331, 90), q_lens=(5, 2, 4), skipped=(0, 3, 1), **shape):
    """Requests with `skipped` unused queries before their own -> batch, and [B] starts and ends of the queries"""
    batch = PagedBatch(lens, [own + before for own, before in zip(q_lens, skipped, strict=True)], **shape)
    starts = batch.q_starts[:-1] + torch.tensor(skipped)
    return batch, starts, starts + torch.tensor(q_lens)


def blocks_of(batch, per_block):
    """[B, blocks] block table of a page table; entries after a request's blocks are invalid."""
    table = batch.page_table[:, ::per_block] // per_block
    beyond = torch.arange(table.shape[1]) * per_block >= batch.num_pages[:, None]
    return table.masked_fill(beyond, 1 << 40)


@pytest.mark.parametrize("std_kind, reduce", in_turn(["l2", "none"], list(REDUCTIONS)))
def test_scores_of_some_queries(reduce, std_kind):
    """Some queries belong to no request, and some do not vote. The third request has no voters, so all queries do."""
    batch, starts, ends = ragged(heads=6)
    statistics = batch.statistics("l2")
    statistics.std_kind = std_kind
    voters = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    arguments = (
        batch.q,
        starts,
        statistics,
        batch.page_table,
        batch.num_pages,
        batch.num_pages - 2,
        torch.tensor([0, 3, 1]),
        0.5,
        reduce,
        ends,
        voters,
        2**0.5,
    )
    want = scored(naive_scores.page_scores, *arguments)
    for put in DEVICES:
        got = scored(page_scores, put(batch.q), *arguments[1:])
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size, lam, reduce", pairwise([1, 2, 8], [0.0, 0.5], list(REDUCTIONS)))
def test_halves_of_runs(size, lam, reduce, monkeypatch):
    monkeypatch.setattr(scores_of, "PAGES", 16)
    batch, starts, ends = ragged(page_size=16, per_block=2)
    g = torch.Generator().manual_seed(0)
    runs = torch.stack([torch.rand(2, 200 // (2 * size), generator=g).argsort(-1)[:, :5].sort(-1)[0] for _ in range(3)])
    runs, runs[1, :, 3:], runs[2] = runs.to(torch.int32), -1, runs[2] % (90 // (2 * size)) if size < 8 else -1
    runs[2] = runs[2].sort(-1)[0]
    voters = torch.arange(len(batch.q)) % 2 == 0
    rule = starts, ends, lam, reduce, voters, 0.7
    arguments = batch.pages, blocks_of(batch, 2), runs, size, torch.tensor([9, 6, 8]), torch.tensor([1, 0, 2])
    want, names = naive_scores.half_scores(ScoringQueries(batch.q, *rule), *arguments)
    for put in DEVICES:
        scores, halves = half_scores(ScoringQueries(put(batch.q), *rule), *arguments)
        assert torch.equal(halves, names)
        torch.testing.assert_close(scores.double(), want, atol=1e-5, rtol=1e-5)


def test_each_asker_keeps_as_many_as_it_may_by_their_names():
    scores = torch.randn(4, 2, 30, generator=torch.Generator().manual_seed(0))
    scores[1, :, 20:] = -torch.inf
    scores[2] = -torch.inf
    names = (3 * torch.arange(30) + 1).expand(4, 2, -1).contiguous().to(torch.int32)
    names[scores == -torch.inf] = -1
    kept = torch.tensor([3, 25, 4, 9])
    want = naive_top.top_pages(scores, 9, kept.clamp_max(9), names)
    for put in DEVICES:
        assert torch.equal(top_pages(put(scores), 9, kept.clamp_max(9), names), want)


@pytest.mark.parametrize("k, m", [(5, 9), (1, 7), *slow((30, 40), (300, 300))])
def test_what_two_choices_share(k, m):
    def pages(count, seed):
        g = torch.Generator().manual_seed(seed)
        rows = torch.rand(6, 2 * max(k, m), generator=g).argsort(1)[:, :count].sort(1)[0].view(3, 2, count)
        rows[1, :, max(count * 2 // 3, 1) :] = -1
        return rows.to(torch.int32)

    now, before, rows = pages(k, 0), torch.full((5, 2, m + 3), -1, dtype=torch.int32), torch.tensor([4, 0, 2])
    before[rows, :, :m] = pages(m, 1)
    before[2] = before[3] = -1
    shares = naive_top.overlap(now, before[rows])
    assert shares[2] == 0 < shares.max()
    for known in ([True] * 3, [True, False, True]):
        known = torch.tensor(known)
        for share in (*shares.unique().tolist(), 0.1, 1.0):  # shares exactly at, below and above the overlaps
            memo = before.clone()
            want = naive_top.unless_alike(now, memo, rows, known, share)
            for put in DEVICES:
                wide = torch.full((5, 2, m + 7), 7, dtype=torch.int32)  # memory next to the rows must not change
                own = wide[..., 2:-2]
                own[:] = before
                assert torch.equal(unless_alike(put(now), own, rows, known, share), want)
                assert torch.equal(own, memo) and (wide[..., :2] == 7).all() and (wide[..., -2:] == 7).all()


def test_pages_are_written_where_choices_are_held():
    """A head without any score above -inf keeps its stored pages."""
    scores = torch.randn(3, 2, 30, generator=torch.Generator().manual_seed(0))
    scores[1], scores[2, 0, 4:] = -torch.inf, -torch.inf
    rows, kept = torch.tensor([3, 0, 1]), torch.tensor([6, 9, 9])
    held = torch.arange(4 * 2 * 12, dtype=torch.int32).view(4, 2, 12)
    want = held.clone()
    naive_top.store_top_pages(want, rows, scores, 9, kept)
    assert torch.equal(want[[0, 2]], held[[0, 2]]) and (want[1, 0, 4:] == -1).all() and (want[3, :, 6:] == -1).all()
    for put in DEVICES:
        wide = torch.full((4, 2, 15), 7, dtype=torch.int32)
        own = wide[..., :12]
        own[:] = held
        store_top_pages(own, rows, put(scores), 9, kept)
        assert torch.equal(own, want) and (wide[..., 12:] == 7).all()


@pytest.mark.parametrize("processors", [1, 1000])
def test_attention_of_some_queries_over_tables_of_blocks(processors, monkeypatch):
    monkeypatch.setattr(attention, "KEYS", 16)
    monkeypatch.setattr(attention, "processors", lambda device: processors)
    batch, starts, ends = ragged(page_size=4, per_block=8)
    chosen = choose(batch, 24)
    chosen[0, :, 10:14] = -1  # gaps
    own = torch.full_like(batch.q, 7.0)
    where = (batch.q, starts, batch.pages, blocks_of(batch, 8))
    arguments = (batch.kv_lens, 4, 0.3, False, ends, 8)
    want = naive_attention.sparse_attention(*where, chosen, *arguments, own.clone())
    assert (want[[5, 6, 7, 10]] == 7).all() and (want != 7).any()
    for put in DEVICES:
        got = sparse_attention(put(batch.q), *where[1:], chosen, *arguments, own.clone())
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    # the same with choices in rows of a wider pool, plus all pages from `tails` on
    tails = torch.tensor([45, 70, 23], dtype=torch.int32)  # requests have 50, 83 and 23 pages
    pool, rows = torch.full((6, 2, 31), 99, dtype=torch.int32), torch.tensor([5, 0, 3])
    held = pool[..., 2:26]
    held[rows] = torch.where(chosen < tails[:, None, None], chosen, -1)
    want = naive_attention.sparse_attention(*where, held, *arguments, own.clone(), rows, tails, 13)
    for put in DEVICES:
        got = sparse_attention(put(batch.q), *where[1:], held, *arguments, own.clone(), rows, tails, 13)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_tiles_before_the_first_request():
    """Queries before the first request, as if rows of its prompt were recomputed, too"""
    batch, starts, ends = ragged(skipped=(70, 3, 1), page_size=4, per_block=8)
    own = torch.full_like(batch.q, 7.0)
    where, arguments = (starts, batch.pages, blocks_of(batch, 8)), (batch.kv_lens, 4, 0.3, False, ends, 8)
    chosen = choose(batch, 24)
    want = naive_attention.sparse_attention(batch.q, *where, chosen, *arguments, own.clone())
    for put in DEVICES:
        got = sparse_attention(put(batch.q), *where, chosen, *arguments, own.clone())
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("processors", [1, 1000])
def test_moved_values(processors, monkeypatch):
    monkeypatch.setattr(attention, "KEYS", 16)
    monkeypatch.setattr(attention, "processors", lambda device: processors)
    batch, starts, ends = ragged(page_size=4, per_block=8)
    g = torch.Generator().manual_seed(0)
    places = torch.full((3, 331), -1, dtype=torch.int32)
    for b, length in enumerate((200, 331, 90)):
        places[b, torch.randperm(length, generator=g)[: 20 * b]] = torch.arange(20 * b, dtype=torch.int32)
    moved = torch.randn(40, 2, 64, generator=g)
    tails = torch.tensor([45, 70, 20], dtype=torch.int32)
    chosen = torch.full((3, 2, 24), -1, dtype=torch.int32)
    for own, tail, kept in zip(chosen, tails.tolist(), (10, 24, 12), strict=True):  # the same number for all heads
        own[:, :kept] = torch.rand(2, tail, generator=g).argsort(1)[:, :kept].sort(1)[0]
    rows = torch.tensor([2, 0, 1])
    arguments = (
        batch.q,
        starts,
        ends,
        batch.pages,
        blocks_of(batch, 8),
        chosen[[1, 2, 0]],
        batch.kv_lens,
        4,
        0.3,
        moved,
        places,
        8,
    )
    own = torch.full_like(batch.q, 7.0)
    want = naive_attention.sparse_delta(*arguments, own.clone(), rows, tails, 13)
    assert (want[:5] == 0).all() and (want[5] == 7).all() and want[8:10].abs().sum() > 0
    for put in DEVICES:
        got = sparse_delta(put(batch.q), *arguments[1:], own.clone(), rows, tails, 13)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
