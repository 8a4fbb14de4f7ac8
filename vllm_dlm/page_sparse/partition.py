"""Partition of a step's rows into those that read chosen pages and those that read everything, once per step on the
host.

Rows of a prompt read everything. A generated position reads pages chosen for it
alone, however many positions share its step. The keys that a row reads thus do
not depend on chunked prefill, batching, preemption or speculative decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.plugins.selection.pages import PageSelection


@dataclass
class Partition:
    #: (request, first row, rows, keys) of prompts
    prompt: list[tuple[int, int, int, int]] = field(default_factory=list)
    #: (request, row, keys) of generated positions, which read all pages (`whole`) or chosen pages (`sparse`)
    whole: list[tuple[int, int, int]] = field(default_factory=list)
    sparse: list[tuple[int, int, int]] = field(default_factory=list)

    def dense(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """`prompt` and `whole` as a separate batch, in order -> request, number of rows and number of keys of each
        part, and the step's rows that make up the batch."""
        parts = sorted(
            self.prompt + [(request, row, 1, keys) for request, row, keys in self.whole], key=lambda part: part[1]
        )
        requests, firsts, counts, keys = map(list, zip(*parts, strict=True))
        rows = [row for first, count in zip(firsts, counts, strict=True) for row in range(first, first + count)]
        return requests, counts, keys, rows

    def counts(self, selection: PageSelection) -> PageCounts:
        """Counts of one layer for the generated positions."""
        whole, sparse = (pages_of([keys for _, _, keys in rows], selection.unit) for rows in (self.whole, self.sparse))
        read = whole + len(self.sparse) * selection.kept_pages
        return PageCounts(len(self.sparse), len(self.whole), read, whole + sparse)


def pages_of(keys: Sequence[int], page_size: int) -> int:
    return sum(-(-n // page_size) for n in keys)


def partition(
    selection: PageSelection, starts: Sequence[int], kv_lens: Sequence[int], prompt_lens: Sequence[int]
) -> Partition:
    """`starts` [B + 1]: first row of each request; `kv_lens`: keys after this step; `prompt_lens`: tokens that were not
    generated."""
    plan = Partition()
    for request, (first, end, keys, prompt) in enumerate(zip(starts, starts[1:], kv_lens, prompt_lens, strict=False)):
        count = end - first
        computed = keys - count
        own = min(count, max(0, prompt - computed))
        if own:
            plan.prompt.append((request, first, own, computed + own))
        for i in range(own, count):
            rows = plan.sparse if selection.leaves_out(computed + i + 1) else plan.whole
            rows.append((request, first + i, computed + i + 1))
    return plan


def prompt_lengths(common, known: Sequence[int] | None) -> list[int]:
    """Prompt lengths of the requests of a step. If the runner does not provide them (profiling), requests that are
    prefilling count as all prompt. If that is unknown, too, requests with several rows do."""
    if known is not None:
        return list(known)
    starts, keys = common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound
    keys = (common.seq_lens.cpu() if keys is None else keys)[: common.num_reqs]
    counts = starts[1 : common.num_reqs + 1] - starts[: common.num_reqs]
    prompt = counts > 1 if common.is_prefilling is None else common.is_prefilling.cpu()[: common.num_reqs]
    return torch.where(prompt, keys, keys - counts).tolist()
