"""POST /v1/dlm/score beside requests that generate."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from starlette.testclient import TestClient

from tests.integration.serving import COPIED, COPY, chat, chat_text
from vllm_dlm.scoring.monte_carlo import draws

CONTEXT = chat_text(COPY)


@pytest.fixture
def score(server):
    def post(expected: int = 200, **body):
        response = httpx.post(f"{server.url}/v1/dlm/score", json=body, timeout=120, trust_env=False)
        assert response.status_code == expected, response.text
        return response.json()

    return post


def test_what_the_model_writes_is_likely(score, ask):
    assert ask(COPY).choices[0].message.content == COPIED
    others = [" x k e b", " e x b k", COPIED]
    for how in ({"mc_num": 32, "seed": 1}, {"method": "blocks"}, {"method": "blocks", "steps": 4}):
        answer = score(context=CONTEXT, continuation=others, **how)
        scores = answer["data"]
        assert [each["index"] for each in scores] == [0, 1, 2]
        assert max(scores, key=lambda each: each["logprob"]) == scores[2]
        assert [each["is_greedy"] for each in scores] == [False, False, True]
        assert scores[2]["num_tokens"] == 4 and scores[2]["logprob"] > -1
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"]


def test_texts_and_their_tokens_score_alike(server, score):
    def ids(text):
        body = {"prompt": text, "add_special_tokens": False}
        return httpx.post(f"{server.url}/tokenize", json=body, timeout=60, trust_env=False).json()["tokens"]

    texts = score(context=[CONTEXT, COPY], continuation=[COPIED, " b"], seed=0)["data"]
    tokens = score(context=[ids(CONTEXT), ids(COPY)], continuation=[ids(COPIED), ids(" b")], seed=0)["data"]
    mixed = score(context=[CONTEXT, ids(COPY)], continuation=[ids(COPIED), ids(" b")], seed=0)["data"]
    assert texts == tokens == mixed
    assert texts[0]["token_ids"] == ids(COPIED)


def test_a_mask_in_a_text_is_text(server, score):
    mask = 2  # of the demo's checkpoint
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": [mask]}, timeout=60, trust_env=False).json()["prompt"]
    (spelt,) = score(context=f"{COPY} {text}", continuation=f" a{text}b", method="blocks")["data"]
    assert mask not in spelt["token_ids"] and spelt["num_tokens"] > 3
    score(400, context=[5, mask], continuation=[6])


@pytest.mark.parametrize(
    "field, body",
    [
        ("continuation", {"continuation": ""}),
        ("context", {"context": "", "continuation": [5]}),
        ("continuation", {"context": [5], "continuation": "a"}),
        ("continuation", {}),
        ("context", {"context": {"text": "a"}, "continuation": "a"}),
        ("context", {"context": ["a", "b"], "continuation": ["a", "b", "c"]}),
        ("context and continuation", {"context": [5] * 400, "continuation": [5] * 200}),
        ("continuation", {"continuation": [5] * 401}),  # canvas.max
        ("continuation", {"continuation": [5, 1 << 40], "context": [5]}),
        ("mc_num", {"continuation": "a", "mc_num": 0}),
        ("mc_num", {"continuation": "a", "mc_num": 1 << 40}),
        ("mc_num", {"continuation": "a", "mc_num": "16"}),
        ("mc_num", {"continuation": "a", "mc_num": 24}),
        ("steps", {"continuation": "a", "method": "monte_carlo", "steps": 2}),
        ("steps", {"continuation": "a", "steps": 0}),
        ("method", {"continuation": "a", "method": "exact"}),
        ("cfg_scale", {"continuation": "a", "cfg_scale": -1}),
        ("seed", {"continuation": "a", "seed": 1 << 70}),
        ("dlm_steps", {"continuation": "a", "dlm_steps": 2}),
        ("temperature", {"continuation": "a", "temperature": 0}),
        ("priority", {"continuation": "a", "priority": 0.5}),
        ("continuation", {"continuation": [" a"] * 10_000}),  # limits.score_pairs
        ("mc_num", {"continuation": [" a"] * 200}),  # limits.score_draws
        (
            "context and continuation",  # limits.score_characters
            {"context": "Copy: a " * 2000, "continuation": [" a"] * 1000, "method": "blocks"},
        ),
        ("context", {"context": "Copy: a " * 2000, "continuation": [5]}),  # vLLM's bound on characters
        ("body", {"context": [[5]] * 100_000, "continuation": [6]}),
    ],
)
def test_bad_input_is_named(score, field, body):
    error = score(400, **({"context": CONTEXT} | body))["error"]
    assert field in error["message"] and error["param"].removeprefix("body.") == field


def test_an_unknown_model(score):
    assert "`other` does not exist" in score(404, context="a", continuation="b", model="other")["error"]["message"]


def test_ordinary_requests_cannot_bring_a_score(complete):
    import openai

    for given in ({"start": 1, "answer": [5]}, [5], "a"):
        with pytest.raises(openai.BadRequestError, match="dlm_score"):
            complete([5], extra={"vllm_xargs": {"dlm_score": given}})


def test_beside_requests_that_generate(score, ask, client, model):
    """Neither changes the other."""
    alone = score(context=CONTEXT, continuation=COPIED, mc_num=64, seed=3)["data"]
    questions = [f"Copy: {' '.join(letters)}" for letters in ("abcd", "wxyz", "kbxe", "mnop")]
    texts = [ask(question).choices[0].message.content for question in questions]
    with ThreadPoolExecutor(8) as pool:
        scored = [
            pool.submit(score, context=CONTEXT, continuation=COPIED, mc_num=64, seed=3, request_id=str(index))
            for index in range(4)
        ]
        written = [pool.submit(ask, question) for question in questions]
        assert [each.result().choices[0].message.content for each in written] == texts
        for each in scored:
            (got,) = each.result()["data"]
            assert got["logprob"] == pytest.approx(alone[0]["logprob"], abs=1e-4)
            assert got["is_greedy"] == alone[0]["is_greedy"]


def test_forwards_are_counted(score, counted):
    """Draws alike are one, and each is one step and the one that hands it out."""
    _, counts = counted(lambda: score(context=CONTEXT, continuation=COPIED, mc_num=64, seed=3))
    different = {tuple(masked.tolist()) for masked in draws(4, 64, 16, 3)}
    assert counts["denoising_steps"] == 2 * len(different) < 128


def test_a_client_that_goes_takes_its_draws_along(server, ask):
    """Half an hour of them"""
    body = {"context": [5] * 300, "continuation": [6] * 150, "mc_num": 1 << 14}
    steps = "vllm:diffusion_num_denoising_steps_total"
    before = server.metrics()

    async def disconnect():
        async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
            request = asyncio.create_task(client.post(f"{server.url}/v1/dlm/score", json=body))
            while server.metrics()[steps] == before[steps] and not request.done():
                await asyncio.sleep(0.1)
            assert request.cancel()

    asyncio.run(disconnect())
    until = time.monotonic() + 60
    while time.monotonic() < until:
        after = server.metrics()
        if not after["vllm:num_requests_running"] + after["vllm:num_requests_waiting"]:
            break
        time.sleep(0.1)
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert 0 < after[steps] - before[steps] < 1 << 13
    assert ask(COPY).choices[0].message.content == COPIED


# -- a server's routes, without an engine --------------------------------------------------


@pytest.fixture(scope="module")
def routes():
    """vLLM's app with `--api-key`"""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--api-key", "secret"])
    return build_app(args, ("generate",))


def test_the_route_is_behind_the_key_and_not_there_for_other_models(routes):
    (plugin,) = [each for each in routes.state.endpoint_plugins if each.name == "vllm_dlm"]
    routes.state.openai_serving_models = None
    client = TestClient(routes, raise_server_exceptions=False)

    def answer(architecture: str, **headers):
        engine = SimpleNamespace(model_config=SimpleNamespace(architecture=architecture))
        asyncio.run(plugin.init_state(engine, routes.state, routes.state.args))
        return client.post("/v1/dlm/score", json={"context": "a", "continuation": "b"}, headers=headers)

    assert answer("LlamaForCausalLM", Authorization="Bearer secret").json() == {"detail": "Not Found"}
    assert answer("LLaDAModelLM").status_code == 401
    assert answer("LLaDAModelLM", Authorization="Bearer secret").status_code == 500  # of an engine that has nothing


def test_a_server_that_does_not_generate_has_no_such_route():
    from vllm.plugins import load_endpoint_plugins

    assert load_endpoint_plugins() == load_endpoint_plugins(("render",)) == []
    assert [plugin.name for plugin in load_endpoint_plugins(("generate",))] == ["vllm_dlm"]


def test_chat_text_is_what_the_template_makes(client, model, score):
    """So that the scores above are of what the model is asked in a chat."""
    usage = client.chat.completions.create(model=model, messages=chat(COPY), max_tokens=1).usage
    scored = score(context=CONTEXT, continuation=[5], method="blocks")["usage"]
    assert scored["prompt_tokens"] == usage.prompt_tokens + 1
