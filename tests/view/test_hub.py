"""What followers cost: nothing until they read, once for all that have read equally far, and never without a bound."""

import asyncio
import gc
import weakref
from types import SimpleNamespace

import msgspec
import pytest

from tests.view.followed import PROMPT, begin, counted, frame, nothing_is_left, reads, request_of, watching
from vllm_dlm.client_cache import CLIENT_CACHES, FRONT_END, usage
from vllm_dlm.options.limits import Limits
from vllm_dlm.view import hub, isolation, observed
from vllm_dlm.view.frames import Replay
from vllm_dlm.view.hub import HUB, Follower, TooManyOnlookers
from vllm_dlm.view.observed import ObservedRequest

__all__ = ["nothing_is_left"]  # a fixture


@pytest.mark.parametrize("silent", [1, 30])
def test_silent_followers_of_a_long_canvas_cost_nothing(monkeypatch, silent):
    async def main() -> None:
        counts, request = counted(monkeypatch), request_of()
        request.take(0, begin(4096), None)
        followers = [watching(request) for _ in range(silent)]
        for step in range(1, 21):
            request.take(0, frame(step, 4096), None)
            await asyncio.sleep(0)
        assert not counts
        # then all of them read, and share one frame
        news = [await reads(follower) for follower in followers]
        assert counts == {"since": 1, "_encode": 1, "_encode_begin": 1}
        assert all(each == news[0] for each in news)
        assert [("begin" in message, message.get("steps")) for message in news[0]] == [(True, None), (False, 20)]
        assert len(news[0][1]["set"]) == 20 and len(news[0][1]["guesses"]) == 4076

    asyncio.run(main())


def test_readers_share_each_frame_and_a_slow_one_gets_fewer(monkeypatch):
    monkeypatch.setattr(hub, "INTERVAL", 0.0)

    async def main() -> None:
        counts, request = counted(monkeypatch), request_of()
        quick, slow = [watching(request) for _ in range(5)], watching(request)
        request.take(0, begin(64), None)
        told = {follower: [] for follower in (*quick, slow)}
        for step in range(1, 13):
            request.take(0, frame(step, 64), None)
            for follower in quick if step % 4 else told:
                told[follower] += await reads(follower)
        # one for the quick ones in each step, one for the slow one in every fourth but the first, where all are new
        assert counts["since"] == counts["_encode"] == 12 + 3
        assert counts["_encode_begin"] == 1
        for follower, messages in told.items():
            replay = Replay(64)
            for message in messages[1:]:
                replay.apply(message)
            assert sorted(replay.filled) == list(range(12))
            assert [message["steps"] for message in messages[1:]] == ([4] * 3 if follower is slow else [1] * 12)

    asyncio.run(main())


def test_frames_are_rarer_the_more_positions_are_followed():
    async def main() -> None:
        request = request_of()
        request.take(0, begin(hub.POSITIONS - PROMPT), None)
        watching(request)
        assert HUB.interval() == hub.INTERVAL
        for _ in range(3):
            watching(request)
        assert HUB.interval() == 4 * hub.INTERVAL

    asyncio.run(main())


# -- bounds --------------------------------------------------------------------------------------


def test_followers_are_bounded_and_one_that_does_not_read_makes_room(monkeypatch):
    limits = Limits(followers=3)

    async def main() -> None:
        request = request_of()
        request.take(0, begin(16), None)
        followers = [watching(request) for _ in range(3)]
        late = Follower()
        with pytest.raises(TooManyOnlookers, match=r"limits\.followers"):
            HUB.admit_follower(late, limits)
        for follower in (followers[0], followers[2]):
            await reads(follower)
        monkeypatch.setattr(hub, "PATIENCE", -1.0)
        evicted = usage(FRONT_END)["followers"].evictions
        HUB.admit_follower(late, limits)
        late.follow(request.canvases[0])
        assert [follower.dropped for follower in followers] == [False, True, False]
        assert usage(FRONT_END)["followers"].evictions == evicted + 1
        assert not followers[1].cursors and followers[1].ready.is_set()
        assert followers[1] not in request.canvases[0].followers and len(HUB.followers) == 3
        # nobody else has anything unread
        await reads(late)
        with pytest.raises(TooManyOnlookers):
            HUB.admit_follower(Follower(), limits)
        assert TooManyOnlookers("").http_status == 503

    asyncio.run(main())


def test_a_stream_with_frames_takes_one_place_for_all_its_prompts():
    async def main() -> None:
        own, limits = Follower(), Limits(followers=1)
        first, second = (request_of(own=own, limits=limits) for _ in range(2))
        assert len(HUB.followers) == 1
        with pytest.raises(TooManyOnlookers):
            request_of(own=Follower(), limits=limits)
        HUB.remove([first])
        assert len(HUB.followers) == 1
        HUB.remove([second])
        assert not HUB.followers

    asyncio.run(main())


def test_observed_choices_are_bounded():
    async def main() -> None:
        limits = Limits(observed=4)
        with pytest.raises(ValueError, match=r"n: 5 .*limits\.observed"):
            request_of(5, limits)
        request = request_of(3, limits)
        with pytest.raises(TooManyOnlookers, match=r"limits\.observed"):
            request_of(2, limits)
        request_of(9, limits, observed=False, trajectory=True, watch=False)  # a list of numbers, as long as the answer
        HUB.remove([request])
        request_of(2, limits)

    asyncio.run(main())


def test_a_client_that_does_not_read_keeps_its_place_no_longer_than_its_request_runs():
    async def main() -> None:
        limits = Limits(observed=1)
        gone = request_of(limits=limits)
        other = ObservedRequest(
            "request", "model", 1, SimpleNamespace(frames=False, watch=True, observed=True, trajectory=False)
        )
        with pytest.raises(TooManyOnlookers):
            HUB.admit(other, limits, lambda name: name == gone.name)
        HUB.admit(other, limits, lambda name: name != gone.name)
        assert HUB.admitted == {other}

    asyncio.run(main())


def test_texts_are_bounded():
    class Tokenizer:
        def decode(self, tokens: list[int]) -> str:
            return f"<{tokens[0]}>"

    text = observed.texts_of(Tokenizer())
    caches = [cell.cell_contents for cell in text.__closure__ if isinstance(cell.cell_contents, observed.ClientCache)]
    assert len(caches) == 1
    for token in range(CLIENT_CACHES["texts"].entries + 10):
        assert text(token) == f"<{token}>"
    assert len(caches[0]) == CLIENT_CACHES["texts"].entries


def test_nothing_is_kept_of_requests_that_ended(monkeypatch):
    """Neither of those that ended while nobody read, nor of those whose view failed"""
    monkeypatch.setattr(isolation.logger, "error", lambda *args: None)

    async def main() -> None:
        kept = []
        for fails in (False, True):
            own = Follower()
            request = request_of(2, own=own)
            request.take(0, begin(64), None)
            watcher = watching(request)
            request.take(0, frame(1, 64), None)
            if fails:
                request.take(0, b"no message", None)
                assert "error" in [*(await reads(watcher))[-1]]
            kept += [weakref.ref(each) for each in (request, own, watcher, *request.canvases)]
            HUB.remove([request])
            await reads(own)
            watcher.close()
            del request, own, watcher
        gc.collect()
        assert [each() for each in kept] == [None] * len(kept)

    asyncio.run(main())


# -- messages ------------------------------------------------------------------------------------


def test_a_long_prompt_has_no_text():
    async def main() -> None:
        request = request_of()
        request.prompt = list(range(observed.LONGEST_PROMPT + 1))
        made = begin(4)
        content = msgspec.msgpack.decode(made)
        content["begin"]["length"] = len(request.prompt) + 4
        follower = watching(request)
        request.take(0, msgspec.msgpack.encode(content), None)
        ((message,),) = [await reads(follower)]
        assert message["begin"]["prompt"] is None and message["begin"]["prompt_tokens"] == observed.LONGEST_PROMPT + 1

    asyncio.run(main())


def test_an_engine_s_fault_ends_the_frames_of_its_choice_only(monkeypatch):
    logged = []
    monkeypatch.setattr(isolation.logger, "error", lambda *args: logged.append(args))

    async def main() -> None:
        own = Follower()
        request = request_of(2, own=own)
        for index in range(2):
            request.take(index, begin(8), None)
        request.take(0, msgspec.msgpack.encode({"error": "IndexError: far out"}), None)
        request.take(0, frame(1, 8), None)
        request.take(1, frame(1, 8), None)
        messages = await reads(own)
        assert [next(iter(message)) for message in messages] == ["error", "begin", "step"]
        assert "IndexError: far out" in messages[0]["error"]["message"]
        assert not logged  # the engine did

    asyncio.run(main())
