"""Steps of made-up requests before the first real one: kernels are compiled for the sizes that serving meets.

A kernel has a variant for each power of two of its tiles and for sizes that 16
divides. Every reuse policy that a request may name is run with one canvas, a
few and many, at a refresh and behind it. Nothing is kept: all blocks are the
one that vLLM hands to nobody.
"""

import numpy as np
from vllm.logger import init_logger

from vllm_dlm.engine.canvas import Canvas
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.denoiser import Denoiser
from vllm_dlm.engine.failures import Failures
from vllm_dlm.engine.request import Denoising, Sampling
from vllm_dlm.methods import methods
from vllm_dlm.options import Options, request_options

logger = init_logger(f"vllm.{__name__}")

CANVASES = (1, 2, 5, 16)
STEPS = 6
PROMPT, RESPONSE = 96, 64


def warm_up(denoiser: Denoiser, server: Options, config, max_model_len: int) -> None:
    for reuse in sorted(methods("reuse")):
        for count in CANVASES:
            states = [_state(f"{reuse} {i}", reuse, server, config, max_model_len) for i in range(count)]
            if failed := _run(denoiser, states, captures=count == 1 and reuse == server.reuse.name):
                logger.warning("Requests with reuse %r will fail here: %s", reuse, next(iter(failed.values())))
                break


def _run(denoiser: Denoiser, states: list[Denoising], captures: bool) -> Failures:
    """One canvas to its end, which meets rare kinds of steps, too; several for some steps."""
    failed = Failures()
    tables = {state.req_id: np.zeros(_blocks(denoiser, state), np.int64) for state in states}
    for step in range(STEPS if len(states) > 1 else RESPONSE):
        if step == STEPS and captures and denoiser.captured is not None:  # between refreshes by now
            (state,) = states
            denoiser.captured.capture_all(denoiser.readers(state, tables[state.req_id])[0].stream)
        if failed or not all(len(state.canvas.candidates()) for state in states):
            break
        for request in denoiser.step(states, tables, Counts(), failed):
            request.state.commit(request.positions, request.proposal, None)
            request.state.take_output()
    return failed


def _state(name: str, reuse: str, server: Options, config, max_model_len: int) -> Denoising:
    options = request_options(server, {"dlm_reuse": reuse})
    response = min(RESPONSE, max_model_len - 1)
    prompt = [0] * min(PROMPT, max_model_len - response)
    canvas = Canvas(options, config.mask_token_id, config.logits_shift, prompt, len(prompt) + response)
    return Denoising(name, canvas, Sampling(0.0, 1.0, 0, seed=0, stop_ids=frozenset()))


def _blocks(denoiser: Denoiser, state: Denoising) -> int:
    canvas = state.canvas
    return denoiser.shape.tokens(state.options, canvas.prompt_len, len(canvas)) // denoiser.shape.block_size
