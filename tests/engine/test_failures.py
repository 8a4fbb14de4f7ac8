"""What goes wrong in one request, or in one step, ends those requests and nothing else."""

from contextlib import contextmanager

import pytest
import torch
from vllm import SamplingParams

from tests.engine.running import free_blocks, tokens
from vllm_dlm.methods import methods
from vllm_dlm.plugins.reuse.flow import FeedForward
from vllm_dlm.step.failures import Failures
from vllm_dlm.step.packing import GroupPacking

PROMPT = {"prompt_token_ids": [390, 7, 8, 9, 10]}


def ask(length=24, **extra):
    return PROMPT, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra)


@pytest.fixture
def llm(engines):
    llm = engines("llada-tiny")
    core = llm.llm_engine.engine_core.engine_core
    before = free_blocks(core)
    yield llm
    assert free_blocks(core) == before
    assert not core.scheduler.canvases and not core.scheduler.running


def outputs(llm, requests):
    prompts, params = zip(*requests, strict=True)
    return [output.outputs[0] for output in llm.generate(list(prompts), list(params), use_tqdm=False)]


@contextmanager
def raising(cls, hook, error):
    """The method's hook raises."""

    def broken(*args, **kwargs):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, hook, classmethod(broken) if hook == "propose" else broken)
        yield


# -- requests that had not met in a batch ----------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", [name for name in methods("selection") if name != "none"])
def test_with_and_without_a_selection_in_one_batch(engines, name, order):
    """Under `none` the one has pages and the other has none, also where the prompt is too short to select from."""
    llm = engines("llada-tiny")
    requests = [ask(dlm_selection=name), ask(12)]
    alone = [tokens(llm, [request])[0] for request in requests]
    assert tokens(llm, [requests[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("reuse", ["fast_dllm/dual", "fast_dllm/prefix"])
@pytest.mark.parametrize("seed", range(6))
def test_a_step_in_which_nothing_is_filled(engines, reuse, seed):
    """Dream's `origin` tosses a coin for the one position a block's first step offers, and no later step can read
    that position; and where a prompt's mask takes its place there is no candidate at all."""
    llm = engines("dream-tiny")
    params = SamplingParams(
        temperature=0,
        max_tokens=16,
        ignore_eos=True,
        seed=seed,
        detokenize=False,
        extra_args={"dlm_decoding": "origin", "dlm_reuse": reuse, "dlm_block_length": 8},
    )
    (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
    (given,) = output.outputs
    assert given.finish_reason == "length" and len(given.token_ids) == 16
    assert 397 not in given.token_ids  # the mask


# -- errors ----------------------------------------------------------------------------------

HOOKS = [
    ("reuse", "plan"),
    ("reuse", "due"),
    ("reuse", "layer"),
    ("reuse", "feature_rows"),
    ("decoding", "quotas"),
    ("decoding", "choose"),
    ("decoding", "propose"),
]


@pytest.mark.parametrize(("kind", "hook"), HOOKS, ids=[hook for _, hook in HOOKS])
def test_a_method_that_raises_fails_its_requests(llm, kind, hook):
    """At its third step: of a request that was admitted and shares its batch with others."""
    name = {"reuse": "dllm_cache", "decoding": "low_confidence"}[kind]
    llm.llm_engine.add_request("broken", *ask(dlm_reuse="dllm_cache", dlm_block_length=4))
    for _ in range(2):
        llm.llm_engine.step()
    done = []
    with raising(methods(kind)[name], hook, KeyError("no such thing")):
        for _ in range(30):
            done += [output for output in llm.llm_engine.step() if output.finished]
    (output,) = done
    assert output.request_id == "broken" and output.outputs[0].finish_reason == "error"
    assert "KeyError" in output.outputs[0].stop_reason and "no such thing" in output.outputs[0].stop_reason


@pytest.mark.parametrize("hook", ["plan", "due"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_the_others_of_the_batch_go_on(llm, hook, order):
    """What can be told apart before and after the forward fails alone."""
    requests = [ask(dlm_reuse="fast_dllm"), ask(16), ask(dlm_reuse="dyllm")]
    alone = [tokens(llm, [request])[0] for request in requests]
    with raising(methods("reuse")["fast_dllm"], hook, ValueError("broken")):
        given = outputs(llm, [requests[i] for i in order])
    for index, output in zip(order, given, strict=True):
        if index == 0:
            assert output.finish_reason == "error" and not output.token_ids
        else:
            assert output.finish_reason == "length" and tuple(output.token_ids) == alone[index]
    assert tokens(llm, requests) == alone


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_that_cannot_be_packed_fails_alone(llm, monkeypatch, order, ranks):
    """Packing is done before the forward, so ranks of tensor parallelism agree on it and none is left waiting."""
    requests = [ask(dlm_reuse="fast_dllm"), ask(16), ask(20)]
    alone = [tokens(llm, [request])[0] for request in requests]
    numbers = GroupPacking.numbers

    def broken(self):
        if any(isinstance(stream.reuse, methods("reuse")["fast_dllm"]) for stream in self.streams):
            raise IndexError("no such row")
        return numbers(self)

    monkeypatch.setattr("vllm_dlm.integration.worker.runner.get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(GroupPacking, "numbers", broken)
    given = outputs(llm, [requests[i] for i in order])
    for index, output in zip(order, given, strict=True):
        if index == 0:
            assert output.finish_reason == "error" and "no such row" in output.stop_reason
        else:
            assert output.finish_reason == "length" and tuple(output.token_ids) == alone[index]
    monkeypatch.undo()
    assert tokens(llm, requests) == alone


def test_an_error_in_the_forward_fails_its_step_and_the_next_is_right(llm):
    requests = [ask(dlm_reuse="dllm_cache"), ask(16)]
    alone = [tokens(llm, [request])[0] for request in requests]
    with raising(methods("reuse")["dllm_cache"], "layer", RuntimeError("broken")):
        given = outputs(llm, requests)
    assert [output.finish_reason for output in given] == ["error", "error"]
    assert tokens(llm, requests) == alone


def yields_no_ask(self, at):
    yield "value"


def returns_too_few(self, at):
    x, ffn = yield FeedForward(at.x)
    return at.all, x[1:], ffn[1:]


@pytest.mark.parametrize(
    ("flow", "why"), [(yields_no_ask, "a flow yields asks"), (returns_too_few, "returned 28 rows as 29")]
)
def test_a_flow_that_is_wrong_says_how(llm, monkeypatch, flow, why):
    monkeypatch.setattr(methods("reuse")["fast_dllm"], "layer", flow)
    ((output,), (good,)) = outputs(llm, [ask(dlm_reuse="fast_dllm")]), outputs(llm, [ask()])
    assert output.finish_reason == "error" and why in output.stop_reason
    assert good.finish_reason == "length"


def test_a_request_that_waits_can_fail(llm):
    """Its plan is asked for before it is admitted."""
    with raising(methods("reuse")["fast_dllm"], "plan", ValueError("broken")):
        (output,) = outputs(llm, [ask(dlm_reuse="fast_dllm")])
    assert output.finish_reason == "error"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_request_its_replica_cannot_hold_does_not_wait_for_ever(engines, monkeypatch, order):
    """The front-end of unequal replicas knows their average only, and lets it through."""
    tight = engines("llada-tiny", block_size=32, num_gpu_blocks_override=10, max_num_batched_tokens=512)
    monkeypatch.setattr("vllm_dlm.request.served_model.ServedModel.replica_blocks", None)
    requests = [ask(240, dlm_reuse="dllm_cache", dlm_cfg_scale=1.0), ask(12)]
    alone = tokens(tight, requests[1:])
    given = outputs(tight, [requests[i] for i in order])
    large, small = (given[order.index(i)] for i in (0, 1))
    assert large.finish_reason == "error" and "blocks of the KV cache" in large.stop_reason
    assert tuple(small.token_ids) == alone[0]


def test_a_block_that_never_ends_is_given_up(llm):
    """A decoding that fills nothing would run for ever."""
    import numpy as np

    cls = methods("decoding")["topk_margin"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "choose", lambda self, proposal, turn, rng: np.zeros(0, np.int64))
        patch.setattr(cls, "threshold", 0.5)  # steps are not scheduled, the last one fills nothing either
        given = outputs(llm, [ask(8, dlm_decoding="topk_margin", dlm_threshold=0.5), ask(8)])
    assert [output.finish_reason for output in given] == ["error", "length"]
    assert "block 0 is not finished after" in given[0].stop_reason and "topk_margin" in given[0].stop_reason


# -- numbers that are none -------------------------------------------------------------------


@contextmanager
def poisoned(tensor):
    kept = tensor.clone()
    with torch.no_grad():
        tensor.view(-1)[0] = torch.nan
    yield
    with torch.no_grad():
        tensor.copy_(kept)


#: on CPUs vLLM repacks the weights of linear layers, so norms take their place
PLACES = {
    "the embedding": lambda model: model.model.embed_tokens.weight[7],
    "layer 0": lambda model: model.model.layers[0].input_layernorm.weight,
    "layer 3": lambda model: model.model.layers[3].post_attention_layernorm.weight,
    "the output head": lambda model: model.model.norm.weight,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reuse", sorted(methods("reuse")))
def test_logits_that_are_no_numbers_name_where_they_come_from(llm, place, reuse):
    (model,) = llm.collective_rpc(lambda worker: worker.model_runner.model)
    for algorithm in ("low_confidence", "entropy"):
        with poisoned(PLACES[place](model).data):
            (output,) = outputs(llm, [ask(dlm_reuse=reuse, dlm_decoding=algorithm)])
        assert output.finish_reason == "error" and not output.token_ids
        assert output.stop_reason.endswith(place)


def test_only_the_request_that_meets_them_fails(llm):
    """Token 7 has a broken embedding: whoever does not use it is served."""
    (model,) = llm.collective_rpc(lambda worker: worker.model_runner.model)
    sound = ({"prompt_token_ids": [390, 8, 9]}, ask()[1])
    (alone,) = tokens(llm, [sound])
    with poisoned(PLACES["the embedding"](model).data):
        first, second = outputs(llm, [ask(), sound])
    assert first.finish_reason == "error"
    assert second.finish_reason == "length" and tuple(second.token_ids) == alone


# -- what cannot be survived -----------------------------------------------------------------


def test_ranks_do_not_leave_each_other_waiting():
    """Errors that may be one rank's alone are raised. All other errors are the same on all ranks."""
    failed = Failures(ranks=2)
    with pytest.raises(RuntimeError, match="broken"), failed.catch("a", in_forward=True):
        raise RuntimeError("broken")
    for error in (MemoryError("no memory"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(error)), failed.catch("a"):
            raise error
    assert not failed
    with failed.catch("a"):
        raise RuntimeError("broken")
    assert failed.keys() == {"a"}


def test_errors_of_the_accelerator_end_the_process():
    failed = Failures()
    with pytest.raises(torch.AcceleratorError), failed.catch("a"):
        raise torch.AcceleratorError("an illegal memory access was encountered")
    with failed.catch("a"):
        raise torch.OutOfMemoryError("of 80 GiB 12 MiB are free")
    assert failed["a"].startswith("OutOfMemoryError: of 80 GiB 12 MiB are free")
