"""POST /v1/dlm/score: the scores of `vllm_dlm.score`, computed by a server.

Parsing, checking and drawing run in one dedicated thread, in slices short enough not to block the event loop. With more
threads the event loop would compete with all of them for the GIL, and each thread would keep its own malloc arena.

An `EndpointPlugin` of vLLM. Read in vLLM 0.32 and 0.33: plugins/endpoint_plugins/interface.py,
entrypoints/serve/engine/serving.py, entrypoints/generate/base/serving.py (`_get_priority`).
"""

import asyncio
import json
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.datastructures import State
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.exceptions import GenerationError
from vllm.inputs import tokens_input

from vllm_dlm.configuration import server_options_of
from vllm_dlm.options.types import OptionError
from vllm_dlm.refusal import refuse
from vllm_dlm.scoring.body import parse_body, read_body
from vllm_dlm.scoring.pairs import PairInputs
from vllm_dlm.scoring.scores import How, Job, Method, Pair, PairScore, jobs, resolved

T = TypeVar("T")

PATH = "/v1/dlm/score"
#: maximum number of forwards of one HTTP request in the engine, and of tokens in their continuations. If all of them
#: end in the same step, vLLM creates the log-probabilities of all of these tokens before the event loop continues.
AT_ONCE, TOKENS_AT_ONCE = 64, 1 << 14
#: number of forwards that are created at a time
SLICE = 16


class ScoreRequest(How):
    context: Any = Field(description="A text, a list of token ids, or a list of either")
    continuation: Any = Field(description="As many as contexts; one of either is used for all of the other")
    add_special_tokens: bool = True
    model: str | None = None
    request_id: str | None = None


class ScorePlugin:
    name = "vllm_dlm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Called only by servers of diffusion models, see integration/routes.py."""
        state.dlm_scores = ServingScores(engine_client, state.openai_serving_models)


class ServingScores(BaseServing):
    def __init__(self, engine_client: Any, models: Any):
        super().__init__(models=models, model_config=engine_client.model_config)
        self.engine_client = engine_client
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dlm-score")

    async def in_thread(self, function: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *given)

    @property
    def processor(self) -> Any:
        return self.engine_client.input_processor

    async def request(self, raw_request: Request) -> ScoreRequest:
        limits = server_options_of(self.model_config).limits
        body = await read_body(raw_request, limits)
        return await self.in_thread(parse_body, body, limits, ScoreRequest)

    async def create(self, request: ScoreRequest, raw_request: Request) -> bytes | ErrorResponse:
        if (unknown := await self._check_model(request)) is not None:
            return unknown
        if self.engine_client.errored:
            raise self.engine_client.dead_error
        try:
            method = resolved(request, server_options_of(self.model_config).attention)
        except OptionError as error:
            refuse(error.field, getattr(request, error.field), str(error), whole=True)
        pairs = await self.pairs(request, method)
        request_id = f"score-{self._base_request_id(raw_request, default=request.request_id)}"
        scores = [PairScore(pair, method) for pair in pairs]
        await self.run(scores, request_id, priority_of(request, raw_request))
        return await self.in_thread(response_body, request_id, self.models.model_name(), scores)

    async def pairs(self, request: ScoreRequest, method: Method) -> list[Pair]:
        limits = server_options_of(self.model_config).limits
        given = request.context, request.continuation, method, self.processor, limits
        inputs = await self.in_thread(PairInputs.from_request, *given)
        encoded = await inputs.encode_async(request.add_special_tokens)
        return await self.in_thread(inputs.pairs, encoded)

    async def run(self, scores: list[PairScore], request_id: str, priority: int) -> None:
        """Runs all forwards, a few at a time, and adds each to its score. The first error or a disconnect cancels all
        forwards of the request."""
        to_do, lock, number = self.in_slices(jobs(scores)), asyncio.Lock(), 0

        async def work() -> None:
            nonlocal number
            while True:
                async with lock:
                    if (job := await anext(to_do, None)) is None:
                        return
                    name, number = f"{request_id}-{number}", number + 1
                score, forward, _ = job
                score.add(forward, await self.logprobs(job, name, priority))

        longest = max(len(score.pair.continuation) for score in scores)
        number_of_workers = max(min(AT_ONCE, TOKENS_AT_ONCE // longest), 1)
        workers = [asyncio.create_task(work()) for _ in range(number_of_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await to_do.aclose()

    async def logprobs(self, job: Job, name: str, priority: int) -> list:
        score, _, params = job
        logprobs: list = []
        async for output in self.engine_client.generate(
            tokens_input(score.pair.context), params, name, priority=priority
        ):
            (last,) = output.outputs
            logprobs = last.logprobs
        if last.finish_reason != "length":
            raise GenerationError(f"a forward of a score ended with {last.finish_reason!r}: {last.stop_reason}")
        return logprobs

    async def in_slices(self, items: Iterator[T]) -> AsyncGenerator[T, None]:
        """The items of an iterator that runs in the thread, SLICE items at a time."""
        while part := await self.in_thread(lambda: list(islice(items, SLICE))):
            for item in part:
                yield item


def priority_of(request: ScoreRequest, raw_request: Request) -> int:
    """As for completions: the header if it is a number, otherwise the field."""
    try:
        return int(raw_request.headers["X-Vllm-Priority"])
    except (KeyError, ValueError):
        return request.priority


def response_body(request_id: str, model: str, scores: list[PairScore]) -> bytes:
    """Encodes the scores one by one, because the encoder holds the GIL until it returns."""
    prompts = sum(len(own.pair.context) + len(own.pair.continuation) for own in scores)
    head = {"id": request_id, "object": "list", "created": int(time.time()), "model": model}
    usage = {"prompt_tokens": prompts, "completion_tokens": 0, "total_tokens": prompts}
    data = (dumped({"index": i, "object": "dlm.score", **vars(own.score())}) for i, own in enumerate(scores))
    return f'{dumped(head)[:-1]},"data":[{",".join(data)}],"usage":{dumped(usage)}}}'.encode()


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


router = APIRouter()


async def score_request(raw_request: Request) -> ScoreRequest:
    """Parses the body of a request in a thread; FastAPI would use the event loop."""
    return await raw_request.app.state.dlm_scores.request(raw_request)


@router.post(PATH, dependencies=[Depends(validate_json_request)], include_in_schema=False)
@with_cancellation
@load_aware_call
async def create_scores(raw_request: Request, request: ScoreRequest = Depends(score_request)):  # noqa: B008
    result = await raw_request.app.state.dlm_scores.create(request, raw_request)
    if isinstance(result, ErrorResponse):
        return JSONResponse(content=result.model_dump(), status_code=result.error.code)
    return Response(content=result, media_type="application/json")
