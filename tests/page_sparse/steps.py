"""A batch in one step, as a backend gets it, and a reference implementation of dense attention."""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

HEADS, KV_HEADS, DIM, BLOCK, PAGE = 4, 2, 32, 32, 16
#: (rows, keys, prompt): a prompt, a decoding step, a short one, a later chunk of a prompt, a resumed request, drafts
STEP = [(40, 40, 40), (1, 150, 100), (1, 30, 20), (20, 90, 200), (105, 105, 100), (3, 203, 190)]
#: rows of STEP that do not read all pages with a budget of four
CHOOSING = [40, 162, 163, 164, 165, 166, 167, 168, 169]


class Batch:
    """Requests of a step, with keys in shuffled blocks."""

    def __init__(self, step):
        g = torch.Generator().manual_seed(0)
        counts, self.lens, self.prompts = map(list, zip(*step, strict=True))
        needed = [-(-n // BLOCK) for n in self.lens]
        order = torch.randperm(sum(needed) + 2, generator=g).to(torch.int32)
        self.table = torch.zeros(len(step), 10, dtype=torch.int32)
        for row, blocks in zip(self.table, order[: sum(needed)].split(needed), strict=True):
            row[: len(blocks)] = blocks
        self.pages = torch.randn(len(order), KV_HEADS, BLOCK, 2 * DIM, generator=g)
        starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        self.q = torch.randn(int(starts[-1]), HEADS, DIM, generator=g)
        slots = [
            self.table[i, p // BLOCK] * BLOCK + p % BLOCK
            for i, (count, keys, _) in enumerate(step)
            for p in range(keys - count, keys)
        ]
        self.common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(self.lens, dtype=torch.int32),
            num_reqs=len(step),
            num_actual_tokens=len(self.q),
            max_query_len=max(counts),
            max_seq_len=max(self.lens),
            block_table_tensor=self.table,
            slot_mapping=torch.tensor(slots),
            seq_lens_cpu_upper_bound=torch.tensor(self.lens, dtype=torch.int32),
        )
        #: pages that were full before the step, which earlier steps have summarized
        self.full_before = torch.cat(
            [
                (self.table[i, :, None] * 2 + torch.arange(2)).flatten()[: (keys - count) // PAGE].long()
                for i, (count, keys, _) in enumerate(step)
            ]
        )


def causal_attention(q, pages, tables, q_lens, kv_lens, scale):
    """Causal attention in float64: pages concatenated to one sequence, with a mask over later positions."""
    dim, group = q.shape[2], q.shape[1] // pages.shape[1]
    out, start = torch.empty_like(q), 0
    for table, count, length in zip(tables, q_lens, kv_lens, strict=True):
        # [n, Hkv, block, 2D] -> [N, H, 2D]
        kv = pages[table.long()].transpose(1, 2).flatten(0, 1)[:length].double().repeat_interleave(group, 1)
        query = q[start : start + count].double() * scale
        future = torch.arange(length) > torch.arange(length - count, length)[:, None]
        weights = torch.einsum("qhd,khd->hqk", query, kv[..., :dim]).masked_fill(future, -torch.inf).softmax(-1)
        out[start : start + count] = torch.einsum("hqk,khd->qhd", weights, kv[..., dim:]).to(q.dtype)
        start += count
    return out


def dense(batch: Batch) -> torch.Tensor:
    counts = batch.common.query_start_loc.diff().tolist()
    return causal_attention(batch.q, batch.pages, list(batch.table), counts, batch.lens, DIM**-0.5)


def assert_sparse_where_choosing(batch: Batch, out: torch.Tensor) -> None:
    """Asserts for STEP that every row is computed, and that exactly the rows in CHOOSING left pages out."""
    whole = dense(batch)
    choosing = torch.zeros(len(out), dtype=torch.bool)
    choosing[CHOOSING] = True
    assert not out.isnan().any()
    torch.testing.assert_close(out[~choosing], whole[~choosing], atol=2e-5, rtol=2e-5)
    assert ((out - whole).abs().amax((1, 2)) > 1e-3)[choosing].all()
