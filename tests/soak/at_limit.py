"""Requests to block-causal models that reach the model's length: each must end with "length" and its text."""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.fork import in_a_fork
from tests.soak.process import CHECKPOINTS
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.roles import ShadowingDecoding

MODELS = ("sdar-tiny", "llada2-tiny")
MAX_MODEL_LEN = 1000
BLOCKS = (24, 7, 5)  # 1,000 is a multiple of 5 alone
NEAR = 40  # tokens that a prompt leaves at most, so that a request takes few steps


@dataclass
class Ends:
    """How the requests to one model ended."""

    ends: Counter = field(default_factory=Counter)  # (block length, reason of the end)
    problems: list[str] = field(default_factory=list)


def run(requests: int, seed: int, dtype: str, names=MODELS) -> dict[str, Ends]:
    """-> per model; the requests are divided evenly among models"""
    share = -(-requests // len(names))
    return {name: in_a_fork(ends_of, str(CHECKPOINTS / name), share, seed, dtype, seconds=3600) for name in names}


def ends_of(checkpoint: str, requests: int, seed: int, dtype: str) -> Ends:
    from vllm import LLM

    path = Path(checkpoint)
    llm = LLM(
        checkpoint,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        max_num_seqs=32,
        disable_log_stats=True,
        skip_tokenizer_init=not (path / "tokenizer_config.json").exists(),
    )
    return serve(llm, requests, seed)


def serve(llm, requests: int, seed: int) -> Ends:
    from vllm import SamplingParams

    rng, found = random.Random(f"limit {seed}"), Ends()
    longest = llm.llm_engine.model_config.max_model_len
    known = methods("decoding")
    decodings = [name for name in sorted(known) if not issubclass(known[name], ShadowingDecoding)]
    asked = []
    for number in range(requests):
        width = BLOCKS[number % len(BLOCKS)]
        # At least one whole block is left: whether a shorter rest is filled or refused is not what is tested here.
        prompt = rng.randint(longest - width - NEAR, longest // width * width - width)
        extra = {"dlm_block_length": width, "dlm_decoding": rng.choice(decodings), "dlm_threshold": "none"}
        if extra["dlm_decoding"] == "token_editing":
            extra["dlm_threshold"] = 0.7
        params = SamplingParams(
            temperature=rng.choice((0, 1.0)),
            seed=number,
            ignore_eos=True,
            extra_args=extra,
            max_tokens=longest - prompt + rng.choice((0, 1, 50)),
            detokenize=False,
        )
        asked.append(({"prompt_token_ids": [5 + rng.randrange(300) for _ in range(prompt)]}, params))
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked], use_tqdm=False)
    for (prompt, params), output in zip(asked, outputs, strict=True):
        (answer,) = output.outputs
        width, room = params.extra_args["dlm_block_length"], longest - len(prompt["prompt_token_ids"])
        found.ends[width, answer.finish_reason] += 1
        if answer.finish_reason != "length" or not room - width < len(answer.token_ids) <= room:
            found.problems.append(
                f"{params.extra_args}, prompt of {longest - room} tokens: ended with {answer.finish_reason!r} "
                f"({answer.stop_reason}) and {len(answer.token_ids)} tokens"
            )
    return found
