"""Engines whose steps are captured and replayed on a CPU: instead of replaying a graph, the function is called again,
over the memory and with the sizes it was captured with."""

from itertools import pairwise

import pytest
import torch

from tests.engine.running import runner_of
from vllm_dlm.kernels.varlen_attention.torch import varlen_attention
from vllm_dlm.step import attention
from vllm_dlm.step.buckets import bucket_of
from vllm_dlm.step.captured import CapturedSteps
from vllm_dlm.step.cuda_graphs import repeated
from vllm_dlm.step.denoiser import denoise_live


class Capturing(CapturedSteps):
    """Notes what it is asked for."""

    def __init__(self, llm, room: int | None = None):
        runner = runner_of(llm)
        self.denoiser = denoiser = runner.denoiser
        longest, costs = runner.max_model_len, runner.captured_costs
        super().__init__(
            lambda packed, counts: denoise_live(denoiser.model, packed, denoiser.blocks, counts),
            repeated,
            denoiser.shape,
            denoiser.device,
            longest,
            runner.max_rows,
            costs.room(longest) if room is None else room,
            costs,
        )
        self.met = []
        self.partial_alone = False

    def pad(self, streams):
        self.met.append(bucket_of(streams))
        return None if self.partial_alone and streams[0].whole else super().pad(streams)


@pytest.fixture
def capturing(monkeypatch):
    """An engine whose steps are captured while the test runs, with attention that reads lengths and tables where a
    GPU's would: in the memory that stays."""
    monkeypatch.setattr(attention, "has_flash", lambda q: True)
    monkeypatch.setattr(attention, "flash_attention", over_tables)

    def start(llm, room=None):
        captured = Capturing(llm, room)
        monkeypatch.setattr(captured.denoiser, "captured", captured)
        return captured

    return start


def over_tables(q, k, v, q_starts, k_starts, kv_lens, table, max_q, max_kv, scale):
    """See vllm_dlm/step/attention.py; rows after the last start are NaN."""
    out = torch.full_like(q, torch.nan)
    ends = q_starts.tolist()
    for canvas, (start, end) in enumerate(pairwise(ends)):
        assert end - start <= max_q
        if k_starts is not None:
            first, last = k_starts[canvas : canvas + 2].tolist()
            keys, values = k[first:last], v[first:last]
        else:
            length = int(kv_lens[canvas])
            assert length <= max_kv
            keys, values = (part[table[canvas].long()].flatten(0, 1)[:length] for part in (k, v))
        if end > start:
            out[start:end] = varlen_attention(q[start:end], keys, values, [end - start], [len(keys)], scale)
    return out
