"""Routes of a server that was started with `--dlm-view`: the page, which requests may be watched, and one of them.

The page is a file without data and open to all; the others want a key of `--api-key` where there is one, as vLLM's
routes under /v1 do. Read in vLLM 0.32 and 0.33: entrypoints/serve/middleware/{register,authenticate}.py,
plugins/endpoint_plugins/interface.py.
"""

import json
from argparse import Namespace
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from starlette.datastructures import State
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_dlm.integration.registration import is_diffusion_lm, resolved_options
from vllm_dlm.view.hub import HUB, Followed, Follower
from vllm_dlm.view.offers import offers
from vllm_dlm.view.page import page


class ViewPlugin:
    name = "vllm_dlm_view"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        if getattr(app.state.args, "dlm_view", False):
            app.include_router(router_of(app.state.args))

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Routes look requests up where frames pass."""


def router_of(args) -> APIRouter:
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    guard = AuthenticationMiddleware(None, keys)

    def guarded(request: Request) -> None:
        if keys and not guard.verify_token(request.headers):
            raise HTTPException(401, "Unauthorized")

    router = APIRouter()
    router.add_api_route("/dlm", show_page, methods=["GET"], response_class=HTMLResponse)
    guarded_routes = ("/dlm/options", list_offers), ("/dlm/requests", list_requests), ("/dlm/watch/{request}", watch)
    for path, answer in guarded_routes:
        router.add_api_route(path, answer, methods=["GET"], dependencies=[Depends(guarded)])
    return router


async def show_page() -> str:
    return page()


async def list_offers(request: Request) -> dict:
    config = request.app.state.engine_client.vllm_config
    return offers(resolved_options(config)) if is_diffusion_lm(config.model_config) else {}


async def list_requests() -> list[dict]:
    return [canvas.listed() for canvas in HUB.watched()]


async def watch(request: str) -> StreamingResponse:
    if (canvas := HUB.find(request)) is None:
        raise HTTPException(404, f"no request {request[:100]!r} that may be watched is running: it needs dlm_watch 1")
    follower = Follower()
    canvas.follow(follower)
    return StreamingResponse(events(canvas, follower), media_type="text/event-stream")


async def events(canvas: Followed, follower: Follower) -> AsyncGenerator[str, None]:
    try:
        while True:
            await follower.ready.wait()
            for _, message in follower.take():
                yield f"data: {json.dumps(message)}\n\n"
                if "end" in message:
                    return
    finally:
        if follower in canvas.followers:
            canvas.followers.remove(follower)
