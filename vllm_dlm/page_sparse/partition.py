"""Which rows of a step read chosen pages, which read everything: host data, once per step.

A prompt's rows read everything; a generated position reads the pages chosen
for it alone, however many positions share its step. So a row's keys do not
depend on chunks, batches, preemption or speculation.
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
    #: (request, row, keys) of generated positions: all pages are read, or chosen ones
    whole: list[tuple[int, int, int]] = field(default_factory=list)
    sparse: list[tuple[int, int, int]] = field(default_factory=list)

    def dense(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Prompts and `whole` as a batch of their own, in order: its requests, how many rows each has, how many keys
        each sees, and the rows of the step that it is made of."""
        parts = sorted(
            self.prompt + [(request, row, 1, keys) for request, row, keys in self.whole], key=lambda part: part[1]
        )
        requests, firsts, counts, keys = map(list, zip(*parts, strict=True))
        rows = [row for first, count in zip(firsts, counts, strict=True) for row in range(first, first + count)]
        return requests, counts, keys, rows

    def counts(self, selection: PageSelection) -> PageCounts:
        """What one layer reads for the generated positions."""
        whole, sparse = (
            pages_of([keys for _, _, keys in rows], selection.unit) for rows in (self.whole, self.sparse)
        )  # fmt: skip
        read = whole + len(self.sparse) * selection.kept_pages
        return PageCounts(len(self.sparse), len(self.whole), read, whole + sparse)


def pages_of(keys: Sequence[int], page_size: int) -> int:
    return sum(-(-n // page_size) for n in keys)


def partition(
    selection: PageSelection, starts: Sequence[int], kv_lens: Sequence[int], prompt_lens: Sequence[int]
) -> Partition:
    """`starts` [B + 1] where each request's rows begin, `kv_lens` keys after this step, `prompt_lens` tokens that
    were not generated."""
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
    """Of the requests of a vLLM step. Where the runner did not say (profiling), requests it calls prefilling are all
    prompt, and so are several rows at once."""
    if known is not None:
        return list(known)
    starts, keys = common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound
    keys = (common.seq_lens.cpu() if keys is None else keys)[: common.num_reqs]
    counts = starts[1 : common.num_reqs + 1] - starts[: common.num_reqs]
    prompt = counts > 1 if common.is_prefilling is None else common.is_prefilling.cpu()[: common.num_reqs]
    return torch.where(prompt, keys, keys - counts).tolist()
