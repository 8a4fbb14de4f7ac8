"""An engine and a server's completions without a model: vLLM's own ids, parents and output processing, known steps.

Each choice of a request with the prompt [p, …] gets the tokens 10 p, 10 p + 1, …; step k fills the k-th of them.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from copy import copy
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from vllm_dlm.envelope import Envelope, envelope_output
from vllm_dlm.integration import view
from vllm_dlm.options import request_options, server_options
from vllm_dlm.view.frames import Frame, Guesses

TOKENS = 4


def theirs(function):
    """vLLM's own, whether or not the plugin has patched it in this process"""
    return getattr(function, "__wrapped__", function)


def wanted(prompt: list[int]) -> list[int]:
    return [10 * prompt[0] + step for step in range(TOKENS)]


class Engine:
    """As much of AsyncLLM as a request with frames passes through"""

    def __init__(self, limits: dict | None = None, seed: int = 0):
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.model_config = SimpleNamespace(served_model_name="fake")
        self.input_processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={view.VIEW: True}))
        self.options = server_options({"limits": limits or {}}, "low_confidence")
        self.assign = view.assign_request_id(theirs(InputProcessor.assign_request_id))
        self.process = view.process_outputs(theirs(OutputProcessor.process_outputs))
        self.random = random.Random(seed)
        self.steps: dict[str, int] = {}

    async def pause(self) -> None:
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)

    async def generate(self, prompt, sampling_params, request_id):
        await self.pause()
        request = EngineCoreRequest(
            request_id,
            list(prompt),
            None,
            sampling_params.clone(),
            None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.assign(request)
        queue, parent = RequestOutputCollector(sampling_params.output_kind, request.request_id), None
        parts = [request]
        if sampling_params.n > 1:
            parent = ParentRequest(request)
            parts = [copy(request) for _ in range(sampling_params.n)]
            for index, part in enumerate(parts):
                part.request_id, part.sampling_params = parent.get_child_info(index)
        for index, part in enumerate(parts):
            self.output_processor.add_request(part, None, parent, index, queue)
        try:
            finished = False
            while not finished:
                output = queue.get_nowait() or await queue.get()
                finished = output.finished
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            self.output_processor.abort_requests([request.request_id], internal=True)
            raise

    # -- steps -----------------------------------------------------------------------------

    def step(self) -> None:
        """One token of every request; the outputs come with the last one, as of one canvas block."""
        outputs = []
        for name, state in self.output_processor.request_states.items():
            step = self.steps[name] = self.steps.get(name, 0) + 1
            outputs += [
                envelope_output(name, Envelope(view=message)) for message in messages(state.prompt_token_ids, step)
            ]
            if step == TOKENS:
                tokens, steps = wanted(state.prompt_token_ids), list(range(1, TOKENS + 1))
                outputs.append(envelope_output(name, Envelope(filled=steps)))
                outputs.append(EngineCoreOutput(name, tokens, finish_reason=FinishReason.LENGTH))
        self.process(self.output_processor, outputs)

    async def run(self) -> None:
        while True:
            await self.pause()
            self.step()
            await asyncio.sleep(0)


def messages(prompt: list[int], step: int) -> list[bytes]:
    prompt_len, at = len(prompt), np.array([len(prompt) + step - 1])
    begin = {
        "length": prompt_len + TOKENS,
        "holes": [],
        "canvas": TOKENS,
        "block_length": TOKENS,
        "reuse": "none",
        "selection": "none",
        "decoding": "low_confidence",
        "extent": "full",
        "layers": 1,
        "page_size": None,
        "given": [],
    }
    frame = Frame(
        step,
        1,
        1,
        at,
        np.array([False]),
        np.array([True]),
        np.array([wanted(prompt)[step - 1]]),
        np.array([0.5]),
        np.array([step]),
        np.ones(7),
        np.ones((2, prompt_len + TOKENS)),
        Guesses.build(at, at, np.array([0.5]), np.ones((2, 4, 1))),
    )
    found = [{"begin": begin}] if step == 1 else []
    return [msgspec.msgpack.encode(each) for each in (*found, {"frame": frame.pack()})]


class Completions:
    """As much of a server's completions: one prompt, streamed or not"""

    def __init__(self, engine: Engine):
        self.engine, self.models = engine, SimpleNamespace(model_name=lambda: "fake")
        self.model_config = engine.model_config
        self.create = view.create_completion(Completions.answer)

    async def answer(self, request, raw_request=None):
        kind = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(
            n=request.n, max_tokens=TOKENS, detokenize=False, output_kind=kind, extra_args=request.vllm_xargs
        )
        name, asked = f"cmpl-{request.id}-0", request_options(self.engine.options, request.vllm_xargs)
        outputs = view.observe(self.engine, self.engine.generate(request.prompt, params, name), params, name, asked)
        if request.stream:
            return self.lines(outputs)
        (output,) = [output async for output in outputs]
        return SimpleNamespace(choices=[choice.token_ids for choice in output.outputs])

    async def lines(self, outputs) -> AsyncIterator[str]:
        async for output in outputs:
            for choice in output.outputs:
                text, reason = json.dumps(list(choice.token_ids)), choice.finish_reason
                chunk = {"choices": [{"index": choice.index, "text": text, "finish_reason": reason}]}
                yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"


def completion(prompt: list[int], n: int = 1, stream: bool = True, id: str = "same", **options) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, n=n, stream=stream, id=id, vllm_xargs=options)


@pytest.fixture
def completions(monkeypatch):
    """completions(limits) -> those of an engine whose requests need no checks"""
    monkeypatch.setattr(view, "is_diffusion_lm", lambda config: True)

    def make(limits: dict | None = None, seed: int = 0) -> Completions:
        return Completions(Engine(limits, seed))

    return make


def run(main) -> None:
    """A test with an event loop, in which an engine's steps end with it"""
    asyncio.run(asyncio.wait_for(main, 60))


async def read(stream) -> tuple[dict[int, list[int]], list[dict]]:
    """-> tokens of each choice, and what else its client gets"""
    tokens, others = {}, []
    async for line in stream:
        if line != "data: [DONE]\n\n":
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk["choices"]:
                tokens.setdefault(choice["index"], []).extend(json.loads(choice["text"] or "[]"))
            others += [chunk["dlm"]] if "dlm" in chunk else []
    return tokens, others


def filled(messages: list[dict], choice: int = 0) -> list[int]:
    """Tokens of a choice, as its frames have it"""
    own = [message for message in messages if message.get("choice", 0) == choice and "set" in message]
    return [token for _, token, *_ in sorted(entry for message in own for entry in message["set"])]
