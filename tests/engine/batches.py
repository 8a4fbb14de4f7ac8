"""Requests that share a batch: of every algorithm, of every reuse policy."""

import random

from vllm import SamplingParams

from tests.soak.requests import names
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.roles import RandomOrder

CHECKPOINTS = ["llada-tiny", "llada-tiny-gqa", "dream-tiny"]


def with_presets(name: str) -> list[str]:
    """A reuse policy, and of its presets the first and the last."""
    presets = [found for found in names("reuse") if found.startswith(f"{name}/")]
    return [name, *dict.fromkeys(presets[:1] + presets[-1:])]


POLICIES = [found for name in sorted(methods("reuse")) for found in with_presets(name)]
ALGORITHMS = sorted(methods("decoding"))


def takes_steps(algorithm: str) -> bool:
    try:
        methods("decoding")[algorithm](steps=1)
    except ValueError:
        return False
    return True


def mixed_requests(count: int = 32, seed: int = 0):
    """Prompts of 1 to 120 tokens, canvases of 3 to 48, every algorithm, greedy and sampled, guided and not."""
    rng = random.Random(seed)
    for index in range(count):
        length = rng.randint(3, 48)
        block = rng.choice([4, 8, 16, length])
        blocks = -(-length // block)
        algorithm = ALGORITHMS[index % len(ALGORITHMS)]
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
        prompt = {"prompt_token_ids": [rng.randint(0, 389) for _ in range(rng.randint(1, 120))]}
        yield prompt, params
