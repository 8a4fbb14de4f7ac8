"""Random requests over everything that is registered, from the soak's generator with fixed seeds."""

import random
from dataclasses import replace
from itertools import combinations

from vllm import SamplingParams

from tests.soak.requests import Given, Model, drawn_request, forwards
from vllm_dlm.options import METHOD_KEYS, request_options

#: forwards and tokens of a prompt at most, so that many requests take seconds
FORWARDS, PROMPT = 16, 96
#: how many are drawn for each one that is taken
CHOICE = 10


def drawn(llm, count: int, seed: str, **fixed) -> list[tuple[dict, SamplingParams]]:
    """Requests that the engine accepts and whose tokens do not depend on how many others wait. Those are taken that
    have the most pairs of options which none before them has. `fixed` are options of all of them, None is none."""
    config, server = llm.model_config, llm.model_config.dlm_options
    model = Model(config.max_model_len, config.get_vocab_size(), config.hf_config.mask_token_id)
    rng, taken, seen = random.Random(seed), [], set()
    while len(taken) < count:
        found = [candidate(drawn_request(rng, model, server), fixed) for _ in range(CHOICE * count)]
        left = [(given, pairs_of_options(given, model.mask_id)) for given in found if suits(given, model, server)]
        while left and len(taken) < count:
            given, pairs = left.pop(max(range(len(left)), key=lambda index: len(left[index][1] - seen)))
            if accepted(llm, given):
                taken.append(given)
                seen |= pairs
    return [(given.prompt_ids, given.params()) for given in taken]


def candidate(given: Given, fixed: dict) -> Given:
    options = {name: value for name, value in (given.fields["extra_args"] | fixed).items() if value is not None}
    return replace(given, fields=given.fields | {"extra_args": options})


def suits(given: Given, model: Model, server) -> bool:
    try:
        options = request_options(server, given.fields["extra_args"])
    except ValueError:
        return False
    short = len(given.prompt) <= PROMPT and forwards(given, model) <= FORWARDS
    return short and options.decoding.threshold_floor is None


def pairs_of_options(given: Given, mask_id: int) -> set[tuple[str, str]]:
    fields = {name for name, value in given.fields.items() if value and name not in ("extra_args", "max_tokens")}
    options = {
        f"{name} {value.partition('/')[0]}" if name in METHOD_KEYS else name
        for name, value in given.fields["extra_args"].items()
    }
    masks = {"masks of the prompt"} if mask_id in given.prompt else set()
    return set(combinations(sorted(fields | options | masks), 2))


def accepted(llm, given: Given) -> bool:
    try:
        name = llm.llm_engine.add_request("drawn", given.prompt_ids, given.params())
    except ValueError:
        return False
    llm.llm_engine.abort_request([name], internal=True)
    return True
