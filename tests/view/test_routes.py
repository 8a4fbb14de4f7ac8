"""The routes of --dlm-view, in this process: who may see what, under which name, and how many."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.view.test_hub import begin, frame, nothing_is_left, request_of
from vllm_dlm.options.limits import Limits
from vllm_dlm.view import page
from vllm_dlm.view.hub import HUB, Follower
from vllm_dlm.view.routes import router_of, watch

__all__ = ["nothing_is_left"]


@pytest.fixture
def client():
    app = FastAPI()
    app.include_router(router_of(SimpleNamespace(api_key=[])))
    with TestClient(app) as client:
        yield client


def test_the_page_is_in_no_frame_of_another_site(client):
    answer = client.get("/dlm")
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["frame-ancestors"] == "'none'" and answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.text == page.page()
    # the header lets run what the page has, and nothing else
    assert policy.pop("frame-ancestors") and "; ".join(map(" ".join, policy.items())) == page.policy()
    assert page.policy() in answer.text


def test_data_is_what_it_says_it_is(client):
    answer = client.get("/dlm/requests")
    assert answer.json() == [] and answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/json"


def test_requests_are_listed_with_a_name_and_a_choice(client):
    request = request_of(2)
    request.name = "cmpl-a/b c-1234"
    HUB.requests = {request.name: request}
    listed = client.get("/dlm/requests").json()
    assert [(each["request"], each["choice"]) for each in listed] == [(request.name, 0), (request.name, 1)]
    request_of(watch=False)
    assert len(client.get("/dlm/requests").json()) == 2


def test_each_choice_is_watched_under_its_name(client):
    request = request_of(2)
    request.name = "cmpl-a/b c-1234"  # as an X-Request-Id may be
    HUB.requests = {request.name: request}
    for index in range(2):
        request.canvases[index].text = str
        request.canvases[index].take(begin(4 + index), None)
        request.canvases[index].end("length", 3 + index)
        answer = client.get("/dlm/watch/cmpl-a%2Fb%20c-1234", params={"choice": index})
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert events[0]["begin"]["canvas"] == 4 + index and events[-1]["end"]["tokens"] == 3 + index
    assert not HUB.followers
    for name, choice in (("cmpl-a/b", 0), (request.name, 2), (request.name, -1), ("cmpl-a/b c-1234.0", 0)):
        assert client.get(f"/dlm/watch/{name}", params={"choice": choice}).status_code == 404


def test_too_many_who_watch_are_told_to_come_later(client):
    request = request_of()
    request.options.limits = Limits(followers=1)
    HUB.admit_follower(Follower(), Limits(followers=1))
    answer = client.get(f"/dlm/watch/{request.name}")
    assert answer.status_code == 503 and "limits.followers" in answer.json()["detail"]


def test_a_connection_that_is_never_read_frees_its_place():
    async def main() -> None:
        request = request_of()
        request.take(0, begin(4), None)
        answer = await watch(request.name)
        assert len(HUB.followers) == 1
        del answer
        assert not HUB.followers and not request.canvases[0].followers

    asyncio.run(main())


def test_a_watcher_is_told_that_it_was_dropped():
    async def main() -> None:
        request = request_of()
        request.take(0, begin(4), None)
        events = aiter((await watch(request.name)).body_iterator)
        assert b"begin" in await anext(events)
        request.take(0, frame(1, 4), None)
        (follower,) = HUB.followers.values()
        HUB.followers.evict(follower)
        assert b"did not read" in await anext(events)
        with pytest.raises(StopAsyncIteration):
            await anext(events)

    asyncio.run(main())
