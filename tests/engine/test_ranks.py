"""The same tokens on two ranks as on one."""

import json
import os
import random
import subprocess
import sys

import pytest
from vllm import SamplingParams

from tests.conftest import GOLDEN, start_engine
from tests.engine.running import tokens
from tests.engine.tiny import SERVED, engine, overrides
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.roles import RandomOrder, ShadowingDecoding

ALGORITHMS = sorted(methods("decoding"))


def takes_steps(algorithm: str) -> bool:
    try:
        methods("decoding")[algorithm](steps=1)
    except ValueError:
        return False
    return True


def mixed_requests(count: int = 32, seed: int = 0, attention: str = "full"):
    """Prompts of 1 to 120 tokens, canvases of 3 to 48, every algorithm, greedy and sampled, guided and not."""
    rng = random.Random(seed)
    algorithms = [
        name
        for name in ALGORITHMS
        if attention == "full" or not issubclass(methods("decoding")[name], ShadowingDecoding)
    ]
    for index in range(count):
        length = rng.randint(3, 48)
        block = rng.choice([4, 8, 16, length])
        blocks = -(-length // block)
        algorithm = algorithms[index % len(algorithms)]
        extra = {
            "dlm_decoding": algorithm,
            "dlm_block_length": block,
            "dlm_steps": rng.randint(blocks, max(blocks, length)),
        }
        if not takes_steps(algorithm):
            del extra["dlm_steps"]
        if index % 5 == 0:
            extra["dlm_cfg_scale"] = 1.5
        if index % 7 == 0 and not issubclass(methods("decoding")[algorithm], RandomOrder):
            extra["dlm_threshold"] = 0.05
        sampled = {"temperature": 0.8, "top_p": rng.choice([1.0, 0.9]), "top_k": rng.choice([0, 50])}
        params = SamplingParams(
            **(sampled if index % 2 else {"temperature": 0}),
            max_tokens=length,
            seed=index,
            ignore_eos=index % 3 > 0,
            extra_args=extra,
            detokenize=False,
        )
        prompt = {"prompt_token_ids": [rng.randint(6, 389) for _ in range(rng.randint(1, 120))]}
        yield prompt, params


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint, attention", SERVED)
def test_two_ranks(engines, checkpoint, attention):
    """Tensor parallel, in processes of its own."""
    call = f"two_ranks({checkpoint!r}, {attention!r})"
    code = f"from tests.engine.test_ranks import two_ranks\nif __name__ == '__main__': {call}"
    path = GOLDEN.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=path, capture_output=True, text=True, timeout=600, env=two_rank_environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (*_, line) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    assert [tuple(given) for given in json.loads(line.removeprefix("TOKENS "))] == tokens(
        engine(engines, checkpoint, attention), list(mixed_requests(attention=attention))
    )


def two_rank_environment() -> dict[str, str]:
    first, second = sorted(os.sched_getaffinity(0))[:2] if len(os.sched_getaffinity(0)) > 1 else (0, 0)
    return {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}",  # vLLM asserts on `auto` with one memory node
    }


def two_ranks(checkpoint: str, attention: str) -> None:
    given = overrides(checkpoint, attention)
    llm = start_engine(checkpoint, tensor_parallel_size=2, **({"hf_overrides": given} if given else {}))
    print("TOKENS", json.dumps(tokens(llm, list(mixed_requests(attention=attention)))), flush=True)
