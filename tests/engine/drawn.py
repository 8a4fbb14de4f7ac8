"""Random requests over everything that is registered, from the soak's generator with fixed seeds."""

import random

from tests.soak.requests import Given, Model, drawn_request
from vllm_dlm.options import request_options


def drawn(llm, count: int, seed: str) -> list[Given]:
    """Requests that the engine accepts and whose tokens do not depend on how many others wait."""
    config, server = llm.model_config, llm.model_config.dlm_options
    model = Model(config.max_model_len, config.get_vocab_size(), config.hf_config.mask_token_id)
    rng, found = random.Random(seed), []
    while len(found) < count:
        given = drawn_request(rng, model, server)
        if accepted(llm, given):
            decoding = request_options(server, given.fields["extra_args"]).decoding
            found += [given] * (decoding.threshold_floor is None)
    return found


def accepted(llm, given: Given) -> bool:
    try:
        name = llm.llm_engine.add_request("drawn", given.prompt_ids, given.params())
    except ValueError:
        return False
    llm.llm_engine.abort_request([name], internal=True)
    return True


def answers(llm, given: list[Given]) -> list[tuple]:
    """(tokens, why it ended, which log-probabilities it has) of each sample of each request"""
    outputs = llm.generate([one.prompt_ids for one in given], [one.params() for one in given], use_tqdm=False)
    for output, one in zip(outputs, given, strict=True):
        assert "error" not in {sample.finish_reason for sample in output.outputs}, one
    return [tuple(map(answer, output.outputs)) for output in outputs]


def answer(sample) -> tuple:
    logprobs = sample.logprobs and tuple(tuple(sorted(position)) for position in sample.logprobs)
    return tuple(sample.token_ids), sample.finish_reason, sample.stop_reason, logprobs
