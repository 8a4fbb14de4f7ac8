"""The long run at a server: waves of good and hostile clients; after each the server must be idle, sound and no larger.

Good requests are served in peace first; from then on their answers are known.
"""

import json
import os
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.lib.loops import random_weights
from tests.soak import memory
from tests.soak.clients import Asked, Client, Seen, over_http
from tests.soak.requests import Model, drawn_request
from vllm_dlm.demo import server as demo
from vllm_dlm.demo.questions import questions
from vllm_dlm.methods import methods
from vllm_dlm.options import server_options

LIMIT = 512  # --max-model-len
WAVE = 50  # requests
TOGETHER = 32  # clients at a time
QUIET = 120  # seconds in which a server must be idle after its clients have gone
KNOWN = 40  # requests with known answers
LONG = 256  # tokens and steps of some of them, which keep batches full
#: matrix products that oneDNN keeps, one for each shape; by default so many that memory grows for hours
ONEDNN_CACHE = 64
SERVED = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(ONEDNN_CACHE),
    # The engine computes itself, as on a GPU. A worker process beside it is waited for by spinning: a core for nothing.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
ENOUGH = 20  # problems, to end a run with
#: of 100 clients
MIX = {
    "good": 46,
    "refused": 20,
    "odd": 12,
    "leaves": 8,
    "slow_reader": 4,
    "slow_sender": 3,
    "half_a_body": 3,
    "no_http": 3,
    "large": 1,
}
#: the same with random requests over every option, and rows of the hostile table
HOSTILE_MIX = MIX | {"good": 26, "drawn": 30, "hostile": 20, "odd": 6, "refused": 10}


class Server(demo.Server):
    """The demo's, with hardly any memory, so that requests also wait."""

    def __init__(self, checkpoint: str, dtype: str, *more: str):
        super().__init__(
            *("--plugin", "vllm_dlm", *more, "--served-model-name", demo.MODEL, "--dtype", dtype),
            *("--max-model-len", str(LIMIT), "--max-num-seqs", "16", "--max-num-batched-tokens", "2048"),
            *("--kv-cache-memory-bytes", str(16 << 20)),
            checkpoint=checkpoint,
            environment=demo.ENVIRONMENT | os.environ | SERVED,
        )


@dataclass
class Work:
    seen: Counter = field(default_factory=Counter)  # (client, status)
    problems: list[str] = field(default_factory=list)
    samples: list[memory.Sample] = field(default_factory=list)
    requests: int = 0
    steps: float = 0.0
    seconds: float = 0.0
    largest_refusal: int = 0
    dead: bool = False


def small(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint with the same tokenizer and hardly anything to compute."""
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"d_model": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 192}
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, "bfloat16"), folder / "model.safetensors")
    return folder


def soak(
    checkpoint: str,
    dtype: str,
    seed: int,
    requests: int,
    steps: float = 0,
    minutes: float = 0,
    hostile: bool = False,
    say=print,
) -> Work:
    """Ends after `requests`, or after `steps` denoising steps or `minutes` where those are given."""
    work, begin = Work(), time.monotonic()
    with Server(checkpoint, dtype, *["--dlm-view"] * hostile) as server:
        server.wait(300)
        client, mix = client_of(server, checkpoint), MIX
        if hostile:
            from tests.soak.hostile.mix import MixedClient

            client, mix = MixedClient(client, seed), HOSTILE_MIX
        known = known_answers(client, random.Random(f"known {seed}"))
        say(f"{len(known)} requests with known answers")
        wave = 0
        while len(work.problems) < ENOUGH and not work.dead and not over(work, begin, requests, steps, minutes):
            serve_wave(client, known, random.Random(f"{seed}/{wave}"), work, mix)
            check_quiet(server, client, work)
            work.samples += memory.sample(server.process.pid, work.requests, work.steps)
            wave += 1
            if wave % 5 == 0:
                engine = [s for s in work.samples if s.process.startswith("engine")][-1:]
                memory_now = f"{[s.rss_kib >> 10 for s in engine]} MiB in the engine"
                say(f"{work.requests} requests, {work.steps:.0f} steps, {memory_now}")
        if not work.problems:
            changed = [asked for asked in known if client.ask(asked)[1] != asked.answer]
            work.problems += [f"afterwards {asked.body} is answered otherwise" for asked in changed]
        work.seconds = time.monotonic() - begin
        if work.problems:
            say(server.log_tail(100 if work.dead else 20))
    return work


def over(work: Work, begin: float, requests: int, steps: float, minutes: float) -> bool:
    if steps or minutes:
        return (steps and work.steps >= steps) or (minutes and time.monotonic() - begin >= 60 * minutes)
    return work.requests >= requests


def client_of(server: Server, checkpoint: str) -> Client:
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    return Client(demo.HOST, server.port, LIMIT, config["vocab_size"], config["mask_token_id"])


def known_answers(client: Client, rng: random.Random) -> list[Asked]:
    """The demo's questions, the same filled to the end of a long canvas under every reuse policy, and random requests;
    those that are not refused, each served alone."""
    model, options = Model(LIMIT, client.vocab_size, client.mask_id), server_options({}, "low_confidence")
    to_the_end = {"max_tokens": LONG, "ignore_eos": True}
    long = [to_the_end | {"vllm_xargs": {"dlm_reuse": name}} for name in methods("reuse")]
    ask = (
        Asked("/v1/chat/completions", chat(question.prompt) | more) for question in questions() for more in ({}, *long)
    )
    drawn = (over_http(drawn_request(rng, model, options), demo.MODEL) for _ in range(100 * KNOWN))
    asked = []
    for request in chain(ask, drawn):
        status, request.answer = client.ask(request)
        if status == 200:
            asked.append(request)
        if len(asked) == KNOWN:
            break
    return asked


def chat(text: str) -> dict:
    return {"model": demo.MODEL, "max_tokens": 16, "messages": [{"role": "user", "content": text}]}


def serve_wave(client: Client, known: list[Asked], rng: random.Random, work: Work, mix: dict) -> None:
    """Either a stream of clients of all kinds, or (one wave in ten) a burst of good ones, all at once."""
    burst = rng.random() < 0.1
    kinds = ["good"] * WAVE if burst else rng.choices(list(mix), list(mix.values()), k=WAVE)
    tasks = [(kind, random.Random(rng.getrandbits(64)), rng.choice(known)) for kind in kinds]
    with ThreadPoolExecutor(WAVE if burst else TOGETHER) as pool:
        for seen in pool.map(lambda task: served(client, *task), tasks):
            work.seen[seen.client, seen.status] += 1
            if seen.status != 200:
                work.largest_refusal = max(work.largest_refusal, seen.size)
            if seen.problem:
                work.problems.append(f"{seen.client}: {seen.problem[:2000]}")
    work.requests += len(tasks)


def served(client: Client, kind: str, rng: random.Random, asked: Asked) -> Seen:
    try:
        return getattr(client, kind)(rng, asked)
    except OSError as error:  # no client may lose its connection, unless it says so itself
        return Seen(kind, None, f"{error!r}")


def check_quiet(server: Server, client: Client, work: Work) -> None:
    """Nothing runs, nothing waits and no memory is taken once the clients have gone."""
    end = time.monotonic() + QUIET
    while True:
        if not alive(server, client):
            work.dead = True
            work.problems.insert(0, "the server or its engine is dead")
            return
        values = metrics(client)
        work.steps = values["vllm:diffusion_num_denoising_steps_total"]
        busy = {
            name: values[f"vllm:{name}"]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        if not any(busy.values()):
            return
        if time.monotonic() > end:
            work.problems.append(f"{QUIET} s after the last client there is still {busy}")
            return
        time.sleep(0.1)


def alive(server: Server, client: Client) -> bool:
    try:
        return server.process.poll() is None and client.get("/health")[0] == 200
    except OSError:
        return False


def metrics(client: Client) -> dict[str, float]:
    """name -> value, summed over labels"""
    values: Counter = Counter()
    for line in client.get("/metrics")[1].decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name.partition("{")[0]] += float(value)
    return values


def settings(work: Work) -> dict:
    statuses = Counter(
        f"{client}: {'left or hung up' if status is None else status}" for client, status in work.seen.elements()
    )
    return {
        "requests": work.requests,
        "denoising_steps": int(work.steps),
        "seconds": round(work.seconds),
        "server": {"max_model_len": LIMIT, "kv_cache_mib": 16, "max_num_seqs": 16},
        "clients_together": TOGETHER,
        "largest_refusal_bytes": work.largest_refusal,
        "answers": dict(sorted(statuses.items())),
    }


def samples(work: Work) -> list[dict]:
    return [asdict(sample) for sample in work.samples]
