"""Canvases that grow: the same tokens whoever shares the batch and the memory, and no more memory than rows."""

import random

import pytest
from vllm import SamplingParams

from benchmarks.lib.models import DEMO as CHECKPOINT
from benchmarks.suites.quality import questions
from tests.engine.running import Watching, all_blocks_are_free, preempted, runner_of, tokens
from tests.tiers import slow
from vllm_dlm.methods import methods

CHECKPOINTS = ["llada-tiny", "dream-tiny"]
REUSES = sorted(methods("reuse"))
BEGIN_AGAIN = [name for name in REUSES if getattr(methods("reuse")[name], "begins_again", True)]
SCARCE = {"num_gpu_blocks_override": 40, "block_size": 16}


def growing(count: int, new: int = 64, window: int = 4, reuses: list[str] = REUSES, **more):
    """Of every reuse policy in turn, some guided"""
    rng = random.Random(count)
    for index in range(count):
        extra = {"dlm_reuse": reuses[index % len(reuses)], "dlm_block_length": 8, "dlm_window": window} | more
        if index % 5 == 3:
            extra["dlm_cfg_scale"] = 0.5
        params = SamplingParams(
            temperature=0.7 * (index % 3 == 1),
            seed=index,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield {"prompt_token_ids": [rng.randrange(390) for _ in range(rng.randint(1, 40))]}, params


class Most(Watching):
    """The most requests that ran in one step, and the most rows of a canvas."""

    def __enter__(self):
        self.requests = self.rows = 0
        return super().__enter__()

    def step_begins(self, states):
        self.requests = max(self.requests, len(states))
        self.rows = max(self.rows, *(state.canvas.rows for state in states))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_window_as_long_as_the_canvas_is_the_canvas(engines, checkpoint):
    llm = engines(checkpoint)
    wide = list(growing(2 * len(REUSES), new=24, window=200, dlm_threshold=0.02, dlm_threshold_decay=0.5))
    full = list(growing(2 * len(REUSES), new=24, window=200, dlm_threshold=0.02, dlm_threshold_decay=0.5))
    for _, params in full:
        del params.extra_args["dlm_window"]
    assert tokens(llm, wide) == tokens(llm, full)


@pytest.mark.parametrize("checkpoint", ["llada-tiny", *slow("dream-tiny")])
def test_who_has_no_memory_to_grow_begins_its_block_again(engines, checkpoint):
    given = list(growing(16, new=40, reuses=BEGIN_AGAIN))
    wanted = tokens(engines(checkpoint), given)
    llm = engines(checkpoint, **SCARCE)
    with preempted(llm) as found:
        assert tokens(llm, given) == wanted
    assert found and all_blocks_are_free(llm)


def test_short_answers_to_a_large_bound_take_little_memory(engines):
    """Blocks of 16: a canvas of 203 takes 13 of the 39 there are, one that grows as many as it has rows for."""
    llm = engines("llada-tiny", **SCARCE)
    params = {"temperature": 0, "detokenize": False, "max_tokens": 200}
    prompt = {"prompt_token_ids": [7, 8, 9]}
    extra = {"dlm_reuse": "fast_dllm", "dlm_block_length": 8}
    whole = SamplingParams(ignore_eos=True, extra_args=extra | {"dlm_window": 8}, **params)
    name = llm.llm_engine.add_request("first", prompt, whole)
    while not (begun := llm.llm_engine.step()):
        pass
    llm.llm_engine.abort_request([name], internal=True)
    first = begun[0].outputs[0].token_ids  # a canvas block
    running = {}
    for name, more in (("window", {"dlm_window": 8}), ("full", {"dlm_extent": "full"})):
        stop = SamplingParams(ignore_eos=True, extra_args=extra | more, stop_token_ids=list(first[4:8]), **params)
        with Most(llm) as most:
            found = tokens(llm, [(prompt, stop)] * 12)
        assert len(set(found)) == 1 and len(found[0]) <= (8 if name == "window" else 200)
        running[name] = most.requests, most.rows
    assert running == {"window": (12, 20), "full": (3, 203)}


def test_without_max_tokens_there_is_room_to_the_end(engines):
    llm = engines("llada-tiny")
    longest = runner_of(llm).max_model_len
    params = SamplingParams(
        temperature=0,
        max_tokens=None,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_window": 0, "dlm_block_length": 64, "dlm_threshold": 0.0},
    )
    (got,) = tokens(llm, [({"prompt_token_ids": [7] * 20}, params)])
    assert len(got) == longest - 20


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"dlm_extent": "full", "dlm_window": 3}, "dlm_window: extent 'full' has no window"),
        ({"dlm_window": -1}, "dlm_window: -1 is not valid, it must be at least 0"),
        ({"dlm_window": "a"}, "^dlm_window: 'a' is not valid, it must be int"),
        ({"dlm_extent": "wide"}, "dlm_extent: 'wide' is unknown, valid names are block, full, window"),
        ({"dlm_threshold_decay": 0.3}, "dlm_threshold_decay: 0.3 is not valid, it must be 0 without a threshold"),
    ],
)
def test_what_is_refused(engines, extra, said):
    with pytest.raises(ValueError, match=said.replace("(", "\\(")):
        tokens(engines("llada-tiny"), [({"prompt_token_ids": [7]}, SamplingParams(extra_args=extra))])


def test_64_requests_run_where_8_canvases_of_4_096_fit(engines):
    """They may say 4,000 tokens and say ten: of the demo's questions."""
    block, length, canvases = 16, 4096, 8
    blocks = canvases * length // block
    llm = engines(
        str(CHECKPOINT),
        max_model_len=length,
        block_size=block,
        num_gpu_blocks_override=blocks + 1,
        max_num_seqs=64,
        max_num_batched_tokens=16384,
    )
    prompts = [sample.prompt_ids for sample in questions(64)]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=length - len(prompt),
            detokenize=False,
            extra_args={"dlm_reuse": "fast_dllm", "dlm_block_length": 8, "dlm_window": 24, "dlm_threshold": 0.9},
        )
        for prompt in prompts
    ]
    with Most(llm) as most:
        got = tokens(llm, [({"prompt_token_ids": prompt}, own) for prompt, own in zip(prompts, params, strict=True)])
    assert most.requests == 64 and most.rows < 600 and max(map(len, got)) < 100
    assert all_blocks_are_free(llm)
