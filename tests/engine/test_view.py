"""What an engine tells of its steps: replayed it is what was delivered, added up it is what was counted, and it changes
nothing for anybody. Everything that is registered takes part."""

import gc

import pytest
import torch
from vllm import SamplingParams

from tests.engine.capture import capturing  # noqa: F401
from tests.engine.matrix import combinations, small
from tests.engine.running import Counted, core_of, runner_of, tokens
from tests.engine.test_block_causal import LLADA2, SDAR
from tests.engine.test_block_causal import mixed as blocks_of_known_width
from tests.engine.test_captured import REUSES, some
from tests.engine.viewing import assert_told, finish, generate, start, telling
from tests.tiers import in_turn
from vllm_dlm.methods import methods
from vllm_dlm.options import request_options
from vllm_dlm.plugins.decoding.roles import ShadowingDecoding
from vllm_dlm.view import traces
from vllm_dlm.view.hub import HUB

CHECKPOINTS = ["llada-tiny", "dream-tiny"]
SPARSE = sorted(name for name, selection in methods("selection").items() if selection.sparse)


@pytest.fixture(autouse=True)
def every_step(monkeypatch):
    monkeypatch.setattr(traces, "INTERVAL", 0.0)


def engine(engines, checkpoint, selection):
    return engines(checkpoint, additional_config={"dlm": {"selection": small("selection", selection)}})


@pytest.mark.parametrize("checkpoint, selection", in_turn(CHECKPOINTS, SPARSE))
def test_frames_lead_to_the_tokens_beside_those_nobody_looks_at(engines, checkpoint, selection):
    llm, given = engine(engines, checkpoint, selection), list(combinations(selection, half=0))
    wanted = tokens(llm, given)
    outputs, told = generate(llm, [telling(one) if index % 2 else one for index, one in enumerate(given)])
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == wanted
    for output, own in zip(outputs, told, strict=True):
        if own is None:
            assert not hasattr(output.outputs[0], "dlm")
        elif output.outputs[0].finish_reason != "error":
            assert_told(output, own)
            assert [frame["step"] for frame in own.frames[0]] == list(range(1, len(own.frames[0]) + 1))
    assert_nothing_is_kept(llm)


def assert_nothing_is_kept(llm) -> None:
    llm.llm_engine.step()  # workers are told of what has ended with the next step
    runner, scheduler = runner_of(llm), core_of(llm).scheduler
    assert not HUB.requests and not scheduler.traces and not runner.observed and not runner.seeing.steps
    assert not HUB.admitted and not HUB.followers
    runner.seeing.attach(runner.observed, [])  # as the next step does
    assert runner.seeing not in runner.denoiser.observers and runner.denoiser.head.best is None


@pytest.mark.parametrize("checkpoint, selection", in_turn(CHECKPOINTS, SPARSE))
def test_rows_and_keys_are_those_that_are_counted(engines, checkpoint, selection):
    llm = engine(engines, checkpoint, selection)
    # of a step that fails nothing is told, but it is counted
    given = [telling(one) for one in list(combinations(selection))[::3]]
    outputs, _ = generate(llm, given)
    given = [one for one, output in zip(given, outputs, strict=True) if output.outputs[0].finish_reason == "length"]
    assert len(given) > 0.95 * len(outputs)
    with Counted(llm) as counted:
        _, told = generate(llm, given)
    frames = [frame for own in told for frame in own.frames[0]]
    assert sum(frame["rows"]["recomputed"] for frame in frames) == sum(
        counts.rows["feed_forward"] for counts in counted.steps
    )
    assert sum(frame["keys"]["read"] for frame in frames) == counted.total("keys_read")
    assert sum(frame["keys"]["of"] for frame in frames) == counted.total("keys_dense")
    assert any(frame["heat"]["pages"] for frame in frames)
    layers = told[0].begun[0]["layers"]
    for (_, params), own in zip(given, told, strict=True):
        options = request_options(llm.model_config.dlm_options, params.extra_args)
        if options.decoding.cfg_scale or isinstance(options.decoding, ShadowingDecoding) or options.canvases > 1:
            continue  # rows beside those of the canvas
        for frame in own.frames[0]:
            shares = sum((last - first + 1) * share for first, last, share in frame["heat"]["rows"])
            assert shares * layers == pytest.approx(frame["rows"]["recomputed"], rel=1e-3)


def test_without_reuse_every_row_is_recomputed(engines):
    """But for those of the prompt behind the last layer, which nobody reads."""
    llm = engines("llada-tiny")
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    request = telling(({"prompt_token_ids": [5] * 10}, params))
    _, (told,) = generate(llm, [request])
    layers = told.begun[0]["layers"]
    assert told.begun[0]["prompt_tokens"] == 10 and told.begun[0]["canvas"] == 6
    first = told.frames[0][0]
    assert first["rows"]["live"] == first["rows"]["dense"] == 16 * layers
    assert first["heat"]["rows"][0] == [-10, -1, pytest.approx(1 - 1 / layers, abs=1e-4)]
    assert len(first["set"]) == 1 and len(first["guesses"]) == 5 and first["requests"] == 1


def test_guesses_are_the_most_probable(engines):
    """As the logits of all candidates have it."""
    from tests.engine.running import Recorder

    llm = engines("llada-tiny")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    with Recorder(llm) as recorder:
        _, (told,) = generate(llm, [telling(({"prompt_token_ids": [9, 8, 7]}, params))])
    (steps,) = recorder.steps.values()
    # nobody decodes here, so texts are empty: the numbers are compared as the scheduler sends them
    for (positions, logits), frame in zip(steps, told.frames[0], strict=True):
        probable = torch.from_numpy(logits).softmax(-1)
        for at, _, p, others in frame["guesses"]:
            row = probable[positions.tolist().index(at + 3)]
            best = row.topk(4).values.tolist()
            assert p == pytest.approx(best[0], abs=1e-4)
            assert [q for _, q in others] == pytest.approx(best[1:], abs=1e-4)


@pytest.mark.parametrize("checkpoint", [SDAR, LLADA2])
def test_models_that_know_blocks(engines, checkpoint):
    llm, given = engines(checkpoint), list(blocks_of_known_width(10))
    wanted = tokens(llm, given)
    with Counted(llm) as counted:
        outputs, told = generate(llm, [telling(one) for one in given])
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == wanted
    for output, own in zip(outputs, told, strict=True):
        assert_told(output, own)
    frames = [frame for own in told for frame in own.frames[0]]
    assert sum(frame["rows"]["recomputed"] for frame in frames) == sum(
        counts.rows["feed_forward"] for counts in counted.steps
    )


@pytest.mark.parametrize("at", [2, 7])
def test_what_a_preemption_takes_back_is_told(engines, at):
    llm, scheduler = engines("llada-tiny"), core_of(engines("llada-tiny")).scheduler
    # others begin a block with a refresh then, which changes what they see
    given = [one for one in combinations("none") if one[1].extra_args["dlm_reuse"] == "none"]
    wanted = tokens(llm, given)

    def preempt(step):
        if step == at:
            assert scheduler.reset_prefix_cache(reset_running_requests=True)

    outputs, told = generate(llm, [telling(one) for one in given], preempt)
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == wanted
    for output, own in zip(outputs, told, strict=True):
        assert_told(output, own)
    assert any(frame["unset"] or frame["edited"] for own in told for frame in own.frames[0])


def test_choices_have_canvases_of_their_own(engines):
    llm = engines("llada-tiny")
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=9, ignore_eos=True, detokenize=False)
    (output,), (told,) = generate(llm, [telling(({"prompt_token_ids": [3, 4, 5]}, params))])
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    for choice in range(3):
        assert_told(output, told, choice)


def test_what_ends_early_is_told_as_far_as_it_went(engines):
    llm = engines("llada-tiny")
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    request = ({"prompt_token_ids": [11, 12]}, params)
    (all_of_it,) = tokens(llm, [request])
    params.stop_token_ids, params.ignore_eos = [all_of_it[4]], False
    (output,), (told,) = generate(llm, [telling(request)])
    assert len(output.outputs[0].token_ids) < 24
    assert_told(output, told)


@pytest.mark.parametrize("reuse", REUSES)
def test_steps_that_are_replayed(engines, capturing, reuse):  # noqa: F811
    llm, given = engines("llada-tiny"), list(some(reuse, 6, guided=True))
    wanted = tokens(llm, given)
    captured = capturing(llm)
    with Counted(llm) as counted:
        outputs, told = generate(llm, [telling(one) for one in given])
    assert any(bucket in captured.steps for bucket in captured.met)
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == wanted
    for output, own in zip(outputs, told, strict=True):
        assert_told(output, own)
    frames = [frame for own in told for frame in own.frames[0]]
    assert sum(frame["rows"]["recomputed"] for frame in frames) == sum(
        counts.rows["feed_forward"] for counts in counted.steps
    )
    assert sum(frame["keys"]["read"] for frame in frames) == counted.total("keys_read")


def test_nothing_is_left_of_requests_that_ended_or_were_aborted(engines):
    llm = engines("llada-tiny")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    request = telling(({"prompt_token_ids": [7, 8, 9]}, params))

    def some_requests(count: int):
        started = [start(llm, request)[0] for _ in range(count)]
        for _ in range(3):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(started[::3])
        done = finish(llm)
        assert len(done) == count - len(started[::3])
        llm.llm_engine.step()  # workers are told of what has ended with the next step
        del done
        gc.collect()
        return len(gc.get_objects())

    some_requests(12)
    few = some_requests(12)
    for _ in range(3):
        assert some_requests(36) - few < 24  # not one object of each that there is more
    assert_nothing_is_kept(llm)


# -- LLM.generate --------------------------------------------------------------------------------


def test_llm_has_trajectories(engines):
    llm, given = engines("llada-tiny"), list(combinations("none"))[::4]
    wanted = tokens(llm, given)
    prompts, params = zip(*[telling(one, dlm_frames=0) for one in given], strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == wanted
    for output in outputs:
        steps = output.outputs[0].dlm["trajectory"]
        assert len(steps) == len(output.outputs[0].token_ids) and min(steps) >= 1
    # of one token per step each step fills one
    plain = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, detokenize=False, n=1)
    plain.extra_args = {"dlm_trajectory": 1}
    (output,) = llm.generate([{"prompt_token_ids": [1, 2]}], plain, use_tqdm=False)
    assert sorted(output.outputs[0].dlm["trajectory"]) == list(range(1, 8))
    assert_nothing_is_kept(llm)


@pytest.mark.parametrize("option", ["dlm_frames", "dlm_watch"])
def test_llm_has_nobody_who_looks_on(engines, option):
    params = SamplingParams(max_tokens=4, detokenize=False, extra_args={option: 1})
    with pytest.raises(ValueError, match=option):
        engines("llada-tiny").generate([{"prompt_token_ids": [1, 2]}], params, use_tqdm=False)
