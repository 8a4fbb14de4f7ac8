"""Requests that share an id: clients choose X-Request-Id, and proxies send a request again under the same one."""

import asyncio

from tests.view.engine import TOKENS, completion, completions, filled, read, run, wanted
from vllm_dlm.view.hub import HUB

__all__ = ["completions"]
BOTH = {"dlm_frames": 1, "dlm_watch": 1, "dlm_trajectory": 1}


def test_two_requests_with_one_id_are_both_answered_and_see_their_own_frames(completions):
    """With equal and with different numbers of choices, in many orders of what happens"""

    async def races() -> None:
        for race in range(200):
            served = completions(seed=race)
            steps = asyncio.ensure_future(served.engine.run())
            choices = (3, 1) if race % 2 else (2, 2)

            async def ask(prompt: list[int], n: int, served=served):
                await served.engine.pause()
                return await read(await served.create(served, completion(prompt, n, **BOTH)))

            answers = await asyncio.gather(*(ask([5 + at], n) for at, n in enumerate(choices)))
            steps.cancel()
            for at, (n, (tokens, messages)) in enumerate(zip(choices, answers, strict=True)):
                assert tokens == {choice: wanted([5 + at]) for choice in range(n)}
                assert not [message for message in messages if "error" in message]
                for choice in range(n):
                    assert filled(messages, choice) == wanted([5 + at])
                trajectories = [message["trajectory"] for message in messages if "trajectory" in message]
                assert trajectories == [list(range(1, TOKENS + 1))] * n
                assert len({message["begin"]["request"] for message in messages if "begin" in message}) == 1
            names = {answer[1][0]["begin"]["request"] for answer in answers}
            assert len(names) == 2 and all(name.startswith("cmpl-same-0-") for name in names)
            assert not HUB

    run(races())


def test_choices_and_other_requests_never_share_a_name(completions):
    async def main() -> None:
        served = completions()
        first = await served.create(served, completion([5], 2, id="x", **BOTH))
        second = await served.create(served, completion([6], 1, id="x.0", **BOTH))
        reading = [asyncio.ensure_future(read(stream)) for stream in (first, second)]
        while len(HUB.requests) < 2:
            await asyncio.sleep(0)
        listed = [(each["request"], each["choice"]) for each in (canvas.listed() for canvas in HUB.watched())]
        assert len(set(listed)) == 3
        assert [HUB.find(*name).listed()["prompt_tokens"] for name in listed] == [1, 1, 1]
        assert {HUB.find(*name).request.prompt[0] for name in listed} == {5, 6}
        assert HUB.find(listed[0][0], 2) is None and HUB.find("cmpl-x-0", 0) is None
        steps = asyncio.ensure_future(served.engine.run())
        await asyncio.gather(*reading)
        steps.cancel()

    run(main())


def test_an_id_that_is_not_made_unique_harms_nobody(completions, monkeypatch):
    """vLLM can be told not to, and then mixes such requests up itself: here nothing is raised."""
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")

    async def main() -> None:
        served = completions()
        first = asyncio.ensure_future(read(await served.create(served, completion([5], **BOTH))))
        while not HUB.requests:
            await asyncio.sleep(0)
        other = asyncio.ensure_future(read(await served.create(served, completion([6], 3, **BOTH))))
        for _ in range(20):
            await asyncio.sleep(0)
        served.engine.step()
        for _ in range(TOKENS):
            served.engine.step()
            await asyncio.sleep(0)
        other.cancel()
        first.cancel()
        await asyncio.gather(first, other, return_exceptions=True)

    run(main())
    assert not HUB


def test_a_request_that_nobody_iterates_is_forgotten(completions):
    """Several prompts are checked one after the other, and the first are dropped if a later one is refused."""

    async def main() -> None:
        served = completions()
        stream = await served.create(served, completion([5], **BOTH))
        assert HUB.admitted and HUB.followers
        await stream.aclose()
        del stream
        await asyncio.sleep(0)

    run(main())
    assert not HUB and not HUB.followers


def test_a_client_that_leaves_takes_its_request_along(completions):
    async def main() -> None:
        served = completions()
        reading = asyncio.ensure_future(read(await served.create(served, completion([5], 2, **BOTH))))
        while not HUB.requests:
            await asyncio.sleep(0)
        served.engine.step()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert not HUB and not HUB.followers and not served.engine.output_processor.request_states

    run(main())
