"""Which steps are captured, shared, evicted and refused: whatever clients ask for, the bounds hold."""

import dataclasses
from dataclasses import dataclass
from inspect import isgeneratorfunction
from typing import ClassVar

import numpy as np
import pytest
import torch

from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.block_causal import BlockCausal
from vllm_dlm.canvas.canvas import NOTHING
from vllm_dlm.canvas.stream import Stream
from vllm_dlm.client_cache import CLIENT_CACHES
from vllm_dlm.methods import methods
from vllm_dlm.plugins.reuse.base import Reuse, RowShape, StepPlan, span
from vllm_dlm.plugins.reuse.dllm_cache import DLLMCache
from vllm_dlm.plugins.reuse.dyllm import DyLLM
from vllm_dlm.plugins.reuse.fast_dllm import FastDLLM
from vllm_dlm.step import captured as module
from vllm_dlm.step.buckets import Costs, bucket_of, keeps, layer_key
from vllm_dlm.step.captured import CapturedSteps
from vllm_dlm.step.cuda_graphs import PoolLost, repeated

LONGEST, WIDTH = 512, 8
COSTS = Costs(layers=1, hidden=WIDTH, inner=WIDTH, itemsize=4)


def capturing(room: int = 1 << 40, most_rows: int = 2048, **kwargs) -> CapturedSteps:
    """Captured steps of a model without layers; its hidden states are zeros."""
    shape = BlockShape(16, 2, 16, RowShape(32, WIDTH))
    made = CapturedSteps(
        lambda packed, counts: torch.zeros(len(packed.ids), WIDTH),
        repeated,
        shape,
        torch.device("cpu"),
        LONGEST,
        most_rows,
        room,
        COSTS,
        **kwargs,
    )
    made.captures = []
    capture = made.capture

    def noted(run):
        made.captures.append(run)
        return capture(run)

    made.capture = noted
    return made


def partial(reuse: Reuse, rows: int = 30, budget: int | None = 0, feature_rows: int = 0, prompt: int = 20) -> Stream:
    """A canvas between refreshes; without a budget all live rows are recomputed."""
    length = prompt + rows
    live = span(prompt, length)
    plan = StepPlan(live, live if budget == 0 else live[:0], budget, rows, refresh=False)
    return Stream(
        reuse,
        plan,
        np.zeros(length, np.int64),
        NOTHING,
        NOTHING,
        (prompt, length),
        feature_rows,
        kv_table=np.arange(1 + length // 16),
        feature_table=np.arange(length),
    )


def times(captured: CapturedSteps, stream: Stream, count: int) -> list[bool]:
    """-> whether each was replayed"""
    return [captured.pad([stream]) is not None for _ in range(count)]


def test_a_step_is_captured_on_its_second_use():
    captured = capturing()
    assert times(captured, partial(DyLLM(), budget=None), 4) == [False, True, True, True]
    assert len(captured.captures) == 1


@pytest.mark.parametrize(
    "policies",
    [
        [DLLMCache(prompt_interval=n, transfer_ratio=n / 100) for n in range(1, 90)],
        [FastDLLM(cache=cache, stagger=stagger) for cache in ("prefix", "dual") for stagger in (False, True)],
        [BlockCausal(width=width) for width in range(1, 90)],
        [DyLLM(full_steps=n, refresh_interval=n) for n in range(1, 90)],
    ],
    ids=lambda policies: policies[0].name,
)
def test_policies_with_the_same_layers_share_steps(policies):
    """Presets differ in fields that no layer reads, and any request may give `dlm_block_length`."""
    captured = capturing()
    for policy in policies:
        times(captured, partial(policy), 2)
    assert len(captured.captures) == 1


def test_policies_with_other_layers_do_not():
    captured = capturing()
    for threshold in (0.5, 0.6):
        times(captured, partial(DyLLM(threshold=threshold), budget=None), 2)
    assert len(captured.captures) == 2
    assert layer_key(DLLMCache(transfer_ratio=0.0)) != layer_key(DLLMCache())


def test_a_subclass_says_itself_what_its_layers_read():
    @dataclass(frozen=True)
    class Scaled(FastDLLM):
        name: ClassVar[str] = "scaled"
        scale: float = 1.0

    assert layer_key(Scaled(scale=1.0)) != layer_key(Scaled(scale=2.0))
    assert layer_key(Scaled()) != layer_key(FastDLLM())


@pytest.mark.parametrize("policy", [*methods("reuse").values(), BlockCausal], ids=lambda policy: policy.__name__)
def test_keys_tell_apart_what_layers_read(policy):
    """Functions of a layer are generators, and `layer`, which picks one; all else runs on the host."""
    flows = [
        each for each in vars(policy).values() if isgeneratorfunction(each) or getattr(each, "__name__", "") == "layer"
    ]
    used = {name for flow in flows for name in flow.__code__.co_names}
    read = {field.name for field in dataclasses.fields(policy)} & used
    assert read == {DLLMCache: {"transfer_ratio"}, DyLLM: {"threshold"}}.get(policy, set())


def test_the_least_recently_used_step_makes_room():
    cost = COSTS.step(32)
    captured = capturing(room=3 * cost)
    streams = [partial(DyLLM(threshold=n / 10), budget=None) for n in range(1, 6)]
    for stream in streams[:3]:
        assert times(captured, stream, 2) == [False, True]
    assert captured.room == 0 and times(captured, streams[0], 1) == [True]
    assert times(captured, streams[3], 2) == [False, True]  # in the place of the second
    assert captured.room == 0 and len(captured.steps) == 3
    assert times(captured, streams[0], 1) == [True]
    # Steps that take turns do not evict each other every time.
    launches = module.LAUNCHES_AFTER_EVICTION
    assert times(captured, streams[1], launches + 1) == [False] * launches + [True]
    large = partial(DyLLM(threshold=0.9), rows=250, budget=None)
    assert COSTS.step(256) < 2 * cost
    assert times(captured, large, 2) == [False, True]
    assert captured.room >= 0


def test_nothing_is_evicted_for_a_step_that_has_no_room_anyway():
    captured = capturing(room=2 * COSTS.step(32))
    times(captured, partial(DyLLM(), budget=None), 2)
    steps = captured.steps
    captured.room = -COSTS.step(2048)
    assert times(captured, partial(DyLLM(), rows=250, budget=None), 3) == [False] * 3
    assert captured.steps == steps


def test_steps_of_the_server_stay():
    sizes = len(_at_start(capturing()).pinned)
    room = sum(COSTS.step(bucket.rows) for bucket in _at_start(capturing()).pinned) + 2 * COSTS.step(32)
    captured = _at_start(capturing(room=room))
    for n in range(1, 50):
        times(captured, partial(DyLLM(threshold=n / 50), budget=None), 2)
    assert len(captured.pinned) == sizes and len(captured.served) == 2
    assert times(captured, partial(FastDLLM()), 1) == [True]


def test_steps_of_the_start_displace_those_before():
    captured = capturing(room=2 * COSTS.step(2048))
    for n in range(1, 10):
        times(captured, partial(DyLLM(threshold=n / 10), budget=None), 2)
    captured.capture_all(partial(FastDLLM()))
    assert max(bucket.rows for bucket in captured.pinned) == 2048 and captured.room >= 0


def _at_start(captured: CapturedSteps) -> CapturedSteps:
    captured.capture_all(partial(FastDLLM()))
    return captured


def test_what_clients_name_is_bounded():
    captured = capturing()
    for n in range(3000):
        times(captured, partial(DyLLM(threshold=n / 3000), budget=None), 1 + (n % 3 == 0))
    assert len(captured.waiting) <= CLIENT_CACHES["seen_steps"].entries
    assert len(captured.served) <= CLIENT_CACHES["captured_steps"].entries
    kept = (1 << 40) - sum(COSTS.step(step.bucket.rows) for step in captured.served.values())
    assert captured.room == kept


def test_no_step_has_more_rows_than_workspaces():
    captured = _at_start(capturing(most_rows=512))
    assert max(bucket.rows for bucket in captured.steps) == 512
    assert times(captured, partial(FastDLLM(), rows=200), 1) == [True]
    assert captured.pad([partial(FastDLLM(), rows=200)] * 4) is None


ERRORS = [
    RuntimeError("no kernel"),
    torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
    PoolLost("AcceleratorError: operation not permitted when stream is capturing"),
    MemoryError("the tables of a captured step exceed"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_cannot_be_captured_is_launched(error):
    """Two attempts, however many sizes and fields there are"""
    verified = []
    captured = capturing(verify=verified.append)
    attempts = []

    def failing(run):
        attempts.append(run)
        raise error

    captured.capture = failing
    for n in range(1, 400):
        for rows in (200, 100, 30):
            assert times(captured, partial(DyLLM(threshold=n / 400), rows=rows, budget=None), 2) == [False, False]
    assert len(attempts) == len(verified) == 2
    captured.capture = repeated
    assert times(captured, partial(FastDLLM()), 2) == [False, True], "other policies are captured"
    assert len(captured.refused) <= CLIENT_CACHES["refused_steps"].entries


def test_smaller_steps_are_tried_at_start():
    captured = capturing()
    capture = captured.capture

    def too_large(run):
        graph, hidden = capture(run)
        if len(hidden) > 512:
            raise AssertionError("Workspace is locked")
        return graph, hidden

    captured.capture = too_large
    # All of 1,024 and 2,048 rows are refused by one failure each.
    captured.refused.put(module.policy_key(bucket_of([partial(FastDLLM())]), FastDLLM()), 1024)
    captured.capture_all(partial(FastDLLM()))
    assert {bucket.rows for bucket in captured.steps} == {32, 64, 96, 128, 192, 256, 384, 512}


def test_a_fault_of_the_device_is_raised():
    def broken(device):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    captured = capturing(verify=broken)

    def failing(run):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    captured.capture = failing
    assert times(captured, partial(FastDLLM()), 1) == [False]
    with pytest.raises(torch.AcceleratorError):
        captured.pad([partial(FastDLLM())])


def test_the_first_canvas_does_not_decide_for_all():
    """All live rows of the first one keep features, those of the second do not: captured are steps of both kinds."""
    seen = []
    captured = capturing()
    captured.run = lambda packed, counts: seen.append(packed.groups[0].all_keep) or torch.zeros(len(packed.ids), WIDTH)
    some = [partial(DLLMCache(), budget=6, feature_rows=30), partial(DLLMCache(), budget=6, feature_rows=29)]
    assert keeps(some[0]) and not keeps(some[1])
    assert captured.pad(some) is None and captured.pad(some) is not None
    assert seen == [False, False]
    everything = [some[0], some[0]]
    assert captured.pad(everything) is None and captured.pad(everything) is not None
    assert seen[2:] == [True, True]
    mixed = [partial(DLLMCache(), budget=6), partial(DLLMCache(), budget=None)]
    assert bucket_of(mixed) is None, "with and without a budget"
