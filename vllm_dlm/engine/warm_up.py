"""Steps of made-up requests before the first real one: kernels are compiled for the sizes that serving meets.

A kernel has a variant for each of its tiles' sizes, but none for a number of
requests or for a place in what a step uploads. Every reuse policy that a request may name is run with one canvas, a
few and many, at a refresh and behind it; so is every decoding that has shadows
of canvases. Nothing is kept: all blocks are the one that vLLM hands to nobody.
"""

from typing import Any

import numpy as np
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from vllm_dlm.engine.canvas import Canvas
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.denoiser import Denoiser
from vllm_dlm.engine.failures import Failures
from vllm_dlm.engine.request import Denoising, Sampling
from vllm_dlm.methods import methods
from vllm_dlm.option_types import OptionError
from vllm_dlm.options import METHOD_KEYS, Options, request_options

logger = init_logger(f"vllm.{__name__}")

CANVASES = (1, 2, 5, 16, 24, 40)
STEPS = 6
PROMPT, RESPONSE = 96, 64


def warm_up(denoiser: Denoiser, server: Options, config, max_model_len: int, most: int) -> None:
    """`most`: requests that a step may have"""
    decodings: dict[str, Any] = methods("decoding")
    revoking = [name for name in sorted(decodings) if decodings[name].revokes]
    named = [("dlm_reuse", name) for name in sorted(methods("reuse"))] + [("dlm_algorithm", name) for name in revoking]
    for key, name in named:
        try:
            options = request_options(server, {key: name})
        except OptionError:  # no request may name it on this server
            continue
        for count in sorted({min(count, most) for count in CANVASES}):
            states = [_state(f"{name} {i}", options, config, max_model_len) for i in range(count)]
            captures = count == 1 and options.reuse == server.reuse and not options.decoding.revokes
            if failed := _run(denoiser, states, captures):
                why = next(iter(failed.values()))
                logger.warning("Requests with %s %r will fail here: %s", METHOD_KEYS[key], name, why)
                break


def _run(denoiser: Denoiser, states: list[Denoising], captures: bool) -> Failures:
    """One canvas to its end, which meets rare kinds of steps, too; several for some steps."""
    failed = Failures(get_tensor_model_parallel_world_size())
    tables = {state.req_id: np.zeros(_blocks(denoiser, state), np.int64) for state in states}
    for step in range(STEPS if len(states) > 1 else RESPONSE):
        if step == STEPS and captures and denoiser.captured is not None:  # between refreshes by now
            (state,) = states
            with denoiser.forwards():
                denoiser.captured.capture_all(denoiser.readers.of(state, tables[state.req_id])[0].stream)
        if failed or not all(len(state.canvas.candidates()) for state in states):
            break
        for request in denoiser.step(states, tables, Counts(), failed):
            request.state.commit(request.positions, request.proposal, None, shadow=request.shadow)
            request.state.memory = request.state.options.decoding.memory()  # one of nothing lets the next step judge
            request.state.take_output()
    return failed


def _state(name: str, options: Options, config, max_model_len: int) -> Denoising:
    response = min(RESPONSE, max_model_len - 1)
    prompt = [0] * min(PROMPT, max_model_len - response)
    canvas = Canvas(options, config.mask_token_id, config.logits_shift, prompt, len(prompt) + response)
    return Denoising(name, canvas, Sampling(0.0, 1.0, 0, seed=0, stop_ids=frozenset()))


def _blocks(denoiser: Denoiser, state: Denoising) -> int:
    canvas = state.canvas
    return denoiser.shape.tokens(state.options, canvas.prompt_len, len(canvas)) // denoiser.shape.block_size
