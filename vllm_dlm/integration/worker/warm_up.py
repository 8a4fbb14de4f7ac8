"""Runs steps of dummy requests at start to compile kernels and capture steps, so that no client waits for it.

A kernel has one variant per tile size, independent of the number of requests and
of addresses. Every reuse policy that a request can select runs with one, a few
and many canvases, at and between refreshes, and so does every decoding with
shadow streams. All blocks are vLLM's null block, so nothing is kept.
"""

from collections import Counter
from typing import Any

import numpy as np
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.canvas.denoising import Denoising
from vllm_dlm.canvas.stream import Sampling, Stream
from vllm_dlm.methods import methods
from vllm_dlm.options import METHOD_KEYS, Options, request_options
from vllm_dlm.options.types import OptionError
from vllm_dlm.plugins.decoding.roles import ShadowingDecoding
from vllm_dlm.step.buckets import bucket_of
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.denoiser import Denoiser
from vllm_dlm.step.failures import Failures

logger = init_logger(f"vllm.{__name__}")

CANVASES = (1, 2, 5, 16, 24, 40)
STEPS = 6
PROMPT, RESPONSE = 96, 64
#: length of the schedule that is searched for its most common step; longer than refresh intervals
SCHEDULE = 256


def warm_up(denoiser: Denoiser, server: Options, config, max_model_len: int, most: int) -> None:
    """`most`: maximum number of requests in a step"""
    decodings: dict[str, Any] = methods("decoding")
    shadowing = [name for name in sorted(decodings) if issubclass(decodings[name], ShadowingDecoding)]
    named = [("dlm_reuse", name) for name in sorted(methods("reuse"))] + [("dlm_decoding", name) for name in shadowing]
    for key, name in named:
        try:
            options = request_options(server, {key: name})
        except OptionError:  # not supported by this server
            continue
        for count in sorted({min(count, most) for count in CANVASES}):
            states = [_state(f"{name} {i}", options, config, max_model_len) for i in range(count)]
            if failed := _run(denoiser, states):
                why = next(iter(failed.values()))
                logger.warning("Requests with %s %r will fail here: %s", METHOD_KEYS[key], name, why)
                break
    if denoiser.captured is not None:
        failed = Failures(get_tensor_model_parallel_world_size())
        with failed.catch("steady"), denoiser.forwards():
            if (stream := steady_stream(denoiser, server, config, max_model_len)) is not None:
                denoiser.captured.capture_all(stream)
        for why in failed.values():
            logger.warning("No steps are captured at start: %s", why)


def _run(denoiser: Denoiser, states: list[Denoising]) -> Failures:
    """Runs a single canvas to its end, to include rare kinds of steps, and several canvases for some steps."""
    failed = Failures(get_tensor_model_parallel_world_size())
    tables = {state.req_id: _table(denoiser, state) for state in states}
    for _ in range(STEPS if len(states) > 1 else RESPONSE):
        if failed or not all(len(state.canvas.candidates()) for state in states):
            break
        for reading in denoiser.step(states, tables, Counts(), failed):
            reading.state.commit(reading)
            reading.state.memory = reading.state.options.decoding.memory()  # with empty memory the next step judges
            reading.state.take_output()
    return failed


def steady_stream(denoiser: Denoiser, options: Options, config, max_model_len: int) -> Stream | None:
    """The most common partial step of a canvas with these options; None: it has no partial step that is captured.
    The model is not run: each step fills one position, so the result does not depend on the model."""
    response = min(SCHEDULE, max(max_model_len - PROMPT, max_model_len // 2))
    state = _state("steady", options, config, max_model_len, response)
    canvas, table = state.canvas, _table(denoiser, state)
    token = np.full(1, int(config.mask_token_id == 0))
    streams: dict[tuple, Stream] = {}
    seen: Counter[tuple] = Counter()
    while len(masked := canvas.candidates()):
        for stream in state.streams(denoiser.caches, table):
            bucket = bucket_of([stream])
            if stream.reading is not None and bucket is not None and not bucket.whole:
                streams.setdefault(bucket.flow, stream)
                seen[bucket.flow] += 1
        canvas.apply(Commit(masked[:1], np.full(1, 0.5, np.float32), np.zeros(1, np.int64), token))
        if (finished := canvas.finished()) is not None:
            canvas.hand_out(finished[1] - finished[0])
    return streams[seen.most_common(1)[0][0]] if seen else None


def _state(name: str, options: Options, config, max_model_len: int, response: int = RESPONSE) -> Denoising:
    response = min(response, max_model_len - 1)
    prompt = [0] * min(PROMPT, max_model_len - response)
    length = options.canvas_length(len(prompt), response, max_model_len)
    canvas = Canvas(options, config.mask_token_id, config.logits_shift, prompt, length)
    return Denoising(name, canvas, Sampling(0.0, 1.0, 0, seed=0, stop_ids=frozenset()))


def _table(denoiser: Denoiser, state: Denoising) -> np.ndarray:
    """Null blocks for all blocks of the canvas"""
    canvas = state.canvas
    tokens = denoiser.shape.tokens(state.options, canvas.prompt_len, len(canvas))
    return np.zeros(tokens // denoiser.shape.block_size, np.int64)
