"""Selections in the denoising engine: mixed requests, and what every selection is held to."""

import random

from vllm import SamplingParams

from tests.engine.batches import POLICIES
from tests.engine.running import Counted, tokens
from vllm_dlm.canvas.selected_keys import SelectedKeys


def requests(count=24, longest=120):
    rng = random.Random(3)
    for index in range(count):
        length = rng.randint(8, 16)
        extra = {"dlm_reuse": POLICIES[index % len(POLICIES)], "dlm_block_length": rng.choice([4, 8, length])}
        if index % 6 == 2:
            extra["dlm_cfg_scale"] = 0.5
        if index % 5 == 3:
            extra["dlm_selection"] = "none"
        params = SamplingParams(
            temperature=0.5 * (index % 3 == 0),
            seed=index,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield {"prompt_token_ids": [rng.randint(0, 389) for _ in range(rng.randint(90, longest))]}, params


def engine(engines, checkpoint, selection, **settings):
    return engines(checkpoint, additional_config={"dlm": {"selection": selection}}, **settings)


def assert_batch_invariant(llm) -> None:
    """Requests of all reuse policies, together and alone, of which some keys were left out."""
    given = list(requests(12))
    with Counted(llm) as counted:
        together = tokens(llm, given)
    assert together == [tokens(llm, [request])[0] for request in given]
    assert 0 < counted.total("keys_read") < counted.total("keys_dense")
    assert counted.total("keys_scored") > 0 and counted.total("summaries") > 0


def assert_keeping_all_is_dense(engines, checkpoint, selection, method, monkeypatch) -> None:
    """The sparse path itself, not the way around it: everything is chosen and read as what is chosen."""
    given = list(requests(len(POLICIES)))
    for _, params in given:
        params.temperature = 0.0
        params.extra_args["dlm_selection"] = "none"
    want = tokens(engines(checkpoint), given)
    for _, params in given:
        del params.extra_args["dlm_selection"]
    llm = engine(engines, checkpoint, selection)
    with Counted(llm) as counted:
        assert tokens(llm, given) == want
    assert counted.total("keys_scored") == 0  # nothing to choose from, so nothing is chosen
    monkeypatch.setattr(method, "applies", lambda self, prompt_len, length: True)
    # all stays visible, so no cached context has to be made anew
    begins = SelectedKeys.step_begins
    monkeypatch.setattr(SelectedKeys, "step_begins", lambda self: begins(self) and False)
    with Counted(llm) as counted:
        assert tokens(llm, given) == want
    assert counted.total("keys_scored") > 0
