"""Routes of a server with `--dlm-view`: the page, the list of requests that can be watched, and a watched request.

The page contains no data and needs no key. The other routes require a key of `--api-key` if the server has one, like
vLLM's routes under /v1. Read in vLLM 0.32 and 0.33: entrypoints/serve/middleware/{register,authenticate}.py,
plugins/endpoint_plugins/interface.py.
"""

from argparse import Namespace
from collections.abc import AsyncGenerator
from typing import Any
from weakref import finalize

import msgspec
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.datastructures import State
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_dlm.configuration import is_diffusion_lm, server_options_of
from vllm_dlm.shown import shown
from vllm_dlm.view.hub import HUB, Follower, TooManyOnlookers
from vllm_dlm.view.isolation import error_message
from vllm_dlm.view.offers import offers
from vllm_dlm.view.page import headers, page
from vllm_dlm.view.streams import DROPPED

NO_SNIFFING = {"X-Content-Type-Options": "nosniff"}


class ViewPlugin:
    name = "vllm_dlm_view"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        if getattr(app.state.args, "dlm_view", False):
            app.include_router(router_of(app.state.args))

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """A no-op, because routes find requests in the hub."""


def router_of(args) -> APIRouter:
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    guard = AuthenticationMiddleware(None, keys)

    def guarded(request: Request) -> None:
        if keys and not guard.verify_token(request.headers):
            raise HTTPException(401, "Unauthorized")

    router = APIRouter()
    router.add_api_route("/dlm", show_page, methods=["GET"], response_class=HTMLResponse)
    guarded_routes = ("/dlm/options", list_offers), ("/dlm/requests", list_requests), ("/dlm/watch/{name:path}", watch)
    for path, answer in guarded_routes:
        router.add_api_route(path, answer, methods=["GET"], dependencies=[Depends(guarded)])
    return router


async def show_page() -> HTMLResponse:
    return HTMLResponse(page(), headers=headers())


async def list_offers(request: Request) -> Response:
    """Encoded once, because a server's options do not change."""
    state = request.app.state
    if not hasattr(state, "dlm_offers"):
        model_config = state.engine_client.model_config
        found = offers(server_options_of(model_config)) if is_diffusion_lm(model_config) else {}
        state.dlm_offers = msgspec.json.encode(found)
    return Response(state.dlm_offers, media_type="application/json", headers=NO_SNIFFING)


async def list_requests() -> Response:
    listed = msgspec.json.encode([canvas.listed() for canvas in HUB.watched()])
    return Response(listed, media_type="application/json", headers=NO_SNIFFING)


async def watch(name: str, choice: int = 0) -> StreamingResponse:
    if (canvas := HUB.find(name, choice)) is None:
        raise HTTPException(404, f"request {shown(name)}, choice {choice}: no such request with dlm_watch is running")
    follower = Follower()
    try:
        HUB.admit_follower(follower, canvas.request.options.limits)
    except TooManyOnlookers as error:
        raise HTTPException(error.http_status, error.message) from None
    follower.follow(canvas)
    events = Events(follower)
    return StreamingResponse(events, media_type="text/event-stream", headers=NO_SNIFFING)


class Events:
    """Server-sent events of a follower. The follower is closed when this object is deleted, even if the client
    disconnects before the first event."""

    def __init__(self, follower: Follower):
        self.follower = follower
        finalize(self, follower.close).atexit = False

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        follower = self.follower
        try:
            while follower.cursors:
                await follower.ready.wait()
                for _, message in await follower.take():
                    yield b"data: %s\n\n" % message
            if follower.dropped:
                yield b"data: %s\n\n" % msgspec.json.encode(error_message(DROPPED))
        finally:
            follower.close()
