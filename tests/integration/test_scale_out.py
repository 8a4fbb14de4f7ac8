"""Several replicas behind one port (`--data-parallel-size`): what each answers, holds, counts; their end."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import psutil
import pytest

from tests.integration.serving import BLOCK, COPY, Server, chat_text, needle, options, serving
from vllm_dlm.methods import methods

#: these start several servers of several processes each
pytestmark = pytest.mark.slow

REUSES = [*sorted(methods("reuse")), "fast_dllm/prefix"]
BLOCKS = 6  # of 128 tokens: a replica has five for its canvases, both together have eleven
SERVED = (
    *("--plugin", "vllm_dlm", "--served-model-name", "m", "--max-model-len", "512"),
    *("--kv-cache-memory-bytes", str(16 << 20)),  # unasked, each replica would take most of the memory
    *(
        "--dlm-config",
        json.dumps(
            {
                "decoding": {"name": "low_confidence", "block_length": BLOCK},
                "selection": {"name": "wavefilter", "min_prompt": 64},
            }
        ),
    ),
)
REPLICAS = (*SERVED, "--data-parallel-size", "2", "--num-gpu-blocks-override", str(BLOCKS))
ENVIRONMENT = {
    # With less to write between its two callbacks vLLM always loses the race that shutdown.py is about.
    "VLLM_LOGGING_LEVEL": "ERROR",
}
#: of those with workers, which tell how they end
TELLING = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """Two behind one front-end: it is told the sum of their blocks, and ends by waiting for its streams."""
    log = tmp_path_factory.mktemp("replicas") / "log.txt"
    with serving(log, *REPLICAS, "--api-server-count", "1", **ENVIRONMENT) as server:
        yield server


def mixed() -> list[dict]:
    """Bodies of every reuse policy, greedy and seeded, guided and not."""
    prompts = [chat_text(COPY), *(chat_text(needle("carol", f"{i}1234", repeats=1)[0]) for i in range(3))]
    for index in range(20):
        extra = {"dlm_reuse": REUSES[index % len(REUSES)], "dlm_selection": "none"}
        if index % 7 == 0:
            extra["dlm_cfg_scale"] = 1.0
        asked = {"prompt": prompts[index // 2 % 4], "temperature": 0}
        if index % 2:
            asked = {"prompt": "The", "temperature": 1.5, "ignore_eos": True}
            extra |= {"dlm_decoding": "random", "dlm_suppress_eos": 1}
        yield asked | {"max_tokens": 24, "seed": index, "return_token_ids": True} | options(**extra)


def answers(server: Server, bodies: list[dict], at_once: int = 1, **headers: str) -> list[list[int]]:
    """One by one: shared steps round differently in bfloat16, which a sample may show."""

    def answer(body: dict) -> list[int]:
        return complete(server, body, **headers).choices[0].token_ids

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(answer, bodies))


def complete(server: Server, body: dict, **headers: str):
    return server.client.completions.create(
        model=server.model,
        prompt=body["prompt"],
        stream=body.get("stream", False),
        extra_body=body,
        extra_headers=headers,
    )


def test_each_replica_answers_as_a_server_of_its_own(server, replicas):
    """And counts what it did under its own label."""
    bodies = list(mixed())
    alone = answers(server, bodies)
    assert {len(tokens) for tokens in alone[1::2]} == {24}
    assert len(set(map(tuple, alone))) > 10
    for rank in ("0", "1"):
        before = replicas.metrics(rank)
        assert answers(replicas, bodies, **{"X-data-parallel-rank": rank}) == alone
        after = replicas.metrics(rank)
        delivered = sum(map(len, alone))
        names = ("committed_tokens", "rows_recomputed", "rows_dense")
        counters = [f"vllm:diffusion_num_{name}_total" for name in names]
        committed, recomputed, dense = (after[counter] - before[counter] for counter in counters)
        assert committed == delivered < recomputed < dense


def test_requests_are_spread(server, replicas):
    greedy = [body for body in mixed() if body["temperature"] == 0]
    before = [replicas.metrics(rank)["vllm:diffusion_num_rows_recomputed_total"] for rank in ("0", "1")]
    assert answers(replicas, greedy, at_once=10) == answers(server, greedy)
    after = [replicas.metrics(rank)["vllm:diffusion_num_rows_recomputed_total"] for rank in ("0", "1")]
    assert all(new > old for new, old in zip(after, before, strict=True))


#: (prompt, canvas, options): six blocks each
TOO_MUCH = {
    "its twin": (40, 230, {"dlm_reuse": "fast_dllm", "dlm_selection": "none", "dlm_cfg_scale": 1.0}),
    "features": (40, 340, {"dlm_reuse": "dyllm", "dlm_selection": "none"}),
    "features of both": (40, 100, {"dlm_reuse": "dllm_cache", "dlm_selection": "none", "dlm_cfg_scale": 1.0}),
    "summaries of both": (150, 60, {"dlm_reuse": "fast_dllm", "dlm_cfg_scale": 1.0}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt", "canvas", "extra"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_one_replica_cannot_hold_is_refused(replicas, prompt, canvas, extra, stream):
    body = {"prompt": [5] * prompt, "max_tokens": canvas, "stream": stream} | options(**extra)
    with pytest.raises(openai.BadRequestError, match="KV cache"):
        complete(replicas, body)
    answer = complete(replicas, body | {"max_tokens": 8} | options(**extra | {"dlm_cfg_scale": 0}))
    for part in answer if stream else [answer]:
        assert part.choices


class Streams:
    """Open streams of long canvases, and what became of them."""

    def __init__(self, server: Server, count: int, canvas: int = 120):
        self.ends: list[str] = []
        self.canvas = canvas
        self.complete = 0  # streams that had every canvas block
        self.begun = threading.Barrier(count + 1)
        self.threads = [threading.Thread(target=self.read, args=(server, i)) for i in range(count)]
        for thread in self.threads:
            thread.start()
        self.begun.wait(120)

    def read(self, server: Server, index: int) -> None:
        body = {"model": "m", "prompt": [5 + index], "max_tokens": self.canvas, "ignore_eos": True}
        body |= {"stream": True} | options(dlm_selection="none")
        lines = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
            self.begun.wait(120)  # the headers are there
            try:
                lines += answer.iter_lines()
            except httpx.TransportError:
                lines.append("closed")
        blocks = sum('"text":' in line for line in lines)
        if blocks >= self.canvas / BLOCK and '"finish_reason":"length"' in "".join(lines[-4:]):
            self.complete += 1
        else:
            self.ends.append(" ".join(lines[-4:]))

    def wait(self) -> list[str]:
        """The last lines of those that are not complete."""
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()
        return self.ends


def ended(server: Server, seconds: float = 60) -> int:
    """Exit status of a server that was told to end; all of its processes are gone and its port is free."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.end()
    return gone(server, family, seconds)


def gone(server: Server, family: list[psutil.Process], seconds: float = 60) -> int:
    status = server.process.wait(seconds)
    _, alive = psutil.wait_procs(family, 30)
    assert not alive
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
    return status


def test_a_server_with_open_streams_ends(replicas):
    """The last of these tests: they are gone then. Long steps leave engines no time to report their requests."""
    # Each replica computes one at a time, for many seconds; the others wait for memory.
    streams = Streams(replicas, 8, canvas=400)
    assert ended(replicas) == 0
    ends = streams.wait()
    # On a fast machine the first of each replica may have been through by then.
    assert len(ends) >= 4 and len(ends) + streams.complete == 8
    for end in ends:
        assert "The server was stopped" in end and '"code": 503' in end, end
        assert end.endswith("data: [DONE] "), end


class TestOtherStarts:
    """One process, replicas with as many front-ends (vLLM's default), ranks of one replica."""

    STARTS = {"one": (), "dp": ("--data-parallel-size", "2"), "tp": ("--tensor-parallel-size", "2")}

    @pytest.fixture(params=STARTS)
    def start(self, tmp_path, request):
        """start(*arguments) -> a server, started as the parameter says"""
        with ExitStack() as stack:

            def start(*arguments: str) -> Server:
                arguments = (*SERVED, *self.STARTS[request.param], *arguments)
                return stack.enter_context(serving(tmp_path / "log.txt", *arguments, **TELLING))

            start.name = request.param
            yield start

    def test_answers_and_the_end(self, server, start):
        other = start()
        greedy = [body for body in mixed() if body["temperature"] == 0]
        # Ranks add up in another order, which samples may show; test_ranks.py has them in float32.
        asked = greedy if start.name == "tp" else list(mixed())
        assert answers(other, asked) == answers(server, asked)
        streams = Streams(other, 8)
        ended(other)
        streams.wait()

    @pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
    def test_a_killed_process_ends_the_server(self, start, victim):
        other = start()
        streams = Streams(other, 4)
        family = psutil.Process(other.process.pid).children(recursive=True)
        [*_, last] = [process for process in family if victim in process.cmdline()[0]]
        other.may_end = True
        last.kill()
        gone(other, family)
        assert "unexpectedly" in other.log.read_text(errors="replace")
        streams.wait()

    def test_a_drained_server_finishes_its_streams(self, start):
        other = start("--shutdown-timeout", "120")
        streams = Streams(other, 4)
        assert ended(other, seconds=180) == 0
        assert streams.wait() == [] and streams.complete == 4
