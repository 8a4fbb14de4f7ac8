"""POST /v1/dlm/score: what `vllm_dlm.score` computes, beside whatever else the server is doing.

An `EndpointPlugin` of vLLM's. Read in vLLM 0.32 and 0.33: plugins/endpoint_plugins/interface.py,
entrypoints/serve/engine/serving.py.
"""

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.datastructures import State
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, validate_json_request, with_cancellation
from vllm.exceptions import GenerationError, VLLMNotFoundError
from vllm.inputs import tokens_input

from vllm_dlm.integration.registration import is_diffusion_lm
from vllm_dlm.integration.requests import ONLY_DIFFUSION, refuse, server_options_of
from vllm_dlm.option_types import OptionError
from vllm_dlm.scoring.pairs import pairs_of
from vllm_dlm.scoring.scores import Forward, How, Method, Pair, Read, Score, forwards, resolved

PATH = "/v1/dlm/score"
#: forwards of one HTTP request that the engine knows of at a time; whoever comes later waits for these at most
AT_ONCE = 64


class ScoreRequest(How):
    context: Any = Field(description="A text, a list of token ids, or a list of either")
    continuation: Any = Field(description="As many as contexts, or one of either")
    add_special_tokens: bool = True
    model: str | None = None
    request_id: str | None = None


class ScorePlugin:
    name = "vllm_dlm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        serves = engine_client is not None and is_diffusion_lm(engine_client.model_config)
        state.dlm_scores = ServingScores(engine_client, state.openai_serving_models) if serves else None


class ServingScores(BaseServing):
    def __init__(self, engine_client: Any, models: Any):
        super().__init__(models=models, model_config=engine_client.model_config)
        self.engine_client = engine_client

    async def create(self, request: ScoreRequest, raw_request: Request) -> dict | ErrorResponse:
        if (unknown := await self._check_model(request)) is not None:
            return unknown
        if self.engine_client.errored:
            raise self.engine_client.dead_error
        processor = self.engine_client.input_processor
        try:
            method = resolved(request, server_options_of(processor).attention)
        except OptionError as error:
            refuse(error.field, getattr(request, error.field), str(error), whole=True)
        pairs = pairs_of(request.context, request.continuation, request.add_special_tokens, processor)
        request_id = f"score-{self._base_request_id(raw_request, default=request.request_id)}"
        scores = await self.scores(pairs, method, request_id)
        scored = sum(score.num_tokens for score in scores)
        prompts = sum(len(pair.context) for pair in pairs)
        return {
            "id": request_id,
            "object": "list",
            "created": int(time.time()),
            "model": self.models.model_name(),
            "data": [{"index": index, "object": "dlm.score", **asdict(score)} for index, score in enumerate(scores)],
            "usage": {"prompt_tokens": prompts + scored, "completion_tokens": 0, "total_tokens": prompts + scored},
        }

    async def scores(self, pairs: list[Pair], method: Method, request_id: str) -> list[Score]:
        """A few forwards at a time. The first one that fails, or a client that has gone, ends all of them."""
        reads: list[list[Read]] = [[] for _ in pairs]
        to_do = numbered(pairs, method)

        async def work() -> None:
            for number, index, forward in to_do:
                reads[index].append(await self.read(pairs[index], method, forward, f"{request_id}-{number}"))

        workers = [asyncio.create_task(work()) for _ in range(AT_ONCE)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [Score.of(pair, method, own) for pair, own in zip(pairs, reads, strict=True)]

    async def read(self, pair: Pair, method: Method, forward: Forward, name: str) -> Read:
        prompt, params = tokens_input(pair.context), forward.params(pair, method)
        logprobs: list = []
        async for output in self.engine_client.generate(prompt, params, name):
            (last,) = output.outputs
            logprobs = last.logprobs
        if last.finish_reason != "length":
            raise GenerationError(f"a forward of a score ended with {last.finish_reason!r}: {last.stop_reason}")
        return Read.of(forward, pair, logprobs)


def numbered(pairs: list[Pair], method: Method) -> Iterator[tuple[int, int, Forward]]:
    number = 0
    for index, pair in enumerate(pairs):
        for forward in forwards(pair, method):
            yield number, index, forward
            number += 1


router = APIRouter()


@router.post(PATH, dependencies=[Depends(validate_json_request)], include_in_schema=False)
@with_cancellation
@load_aware_call
async def create_scores(request: ScoreRequest, raw_request: Request):
    handler = getattr(raw_request.app.state, "dlm_scores", None)
    if handler is None:
        raise VLLMNotFoundError(f"{PATH}: {ONLY_DIFFUSION}")
    result = await handler.create(request, raw_request)
    if isinstance(result, ErrorResponse):
        return JSONResponse(content=result.model_dump(), status_code=result.error.code)
    return JSONResponse(content=result)
