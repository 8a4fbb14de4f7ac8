"""Engines that share prompts and engines that do not, and requests that begin alike."""

import random

from vllm import SamplingParams

from tests.engine.running import core_of, free_blocks, poison
from tests.engine.tiny import SERVED, overrides
from vllm_dlm.methods import methods
from vllm_dlm.plugins.decoding.roles import RandomOrder, ShadowingDecoding

CHECKPOINTS = ["sdar-tiny", "llada2-tiny"]
SHIFTED = "fast-dllm-v2-tiny"  # logits predict the next position
#: of the other families, which differ in their layers alone
OTHERS = [
    checkpoint
    for checkpoint, attention in SERVED
    if attention == "block_causal" and checkpoint not in (*CHECKPOINTS, SHIFTED)
]
SIZE = 32  # of vLLM's blocks
USUAL = {"sdar-tiny": 4, "llada2-tiny": 32, SHIFTED: 32}  # width of canvas blocks
LONG = {"max_model_len": 2048, "hf_overrides": {"max_position_embeddings": 2048}}
TIGHT = {"max_model_len": 480, "num_gpu_blocks_override": 16, "max_num_batched_tokens": 2048}


def long(checkpoint: str) -> dict:
    return LONG | {"hf_overrides": LONG["hf_overrides"] | overrides(checkpoint, "block_causal")}


def caching(engines, checkpoint, **settings):
    llm = engines(checkpoint, block_size=SIZE, disable_log_stats=False, **(long(checkpoint) | settings))
    poison(llm)
    return llm


def without(engines, checkpoint):
    return engines(checkpoint, block_size=SIZE, enable_prefix_caching=False, **long(checkpoint))


def outputs(llm, given):
    """-> tokens of each, and how many of its prompt's were found"""
    prompts, params = zip(*given, strict=True)
    got = llm.generate(list(prompts), list(params), use_tqdm=False)
    core = core_of(llm)
    assert free_blocks(core) == core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    return [tuple(one.outputs[0].token_ids) for one in got], [one.num_cached_tokens for one in got]


def ask(ids, length=8, salted=None, **extra):
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra)
    prompt = {"prompt_token_ids": list(ids)}
    return prompt | ({"cache_salt": salted} if salted else {}), params


def some(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(6, 390) for _ in range(count)]  # 5 is a mask of one family


def mixed(count: int, seed: int = 1):
    """Every decoding of such models; prompts that begin alike, in groups, some of them the beginning of others, and
    widths that divide vLLM's blocks or do not."""
    rng, stems = random.Random(seed), [some(120, stem) for stem in range(3)]
    names = sorted(name for name, method in methods("decoding").items() if not issubclass(method, ShadowingDecoding))
    for index in range(count):
        name, width = names[index % len(names)], rng.choice([4, 4, 8, 32, 32, 5, 64])
        extra = {"dlm_decoding": name, "dlm_block_length": width}
        if issubclass(methods("decoding")[name], RandomOrder):
            extra["dlm_threshold"] = "none"
        if index % 9 == 4:
            extra["dlm_cfg_scale"] = 0.7
        stem = rng.choice(stems)[: rng.choice([120, 120, 97, 64, 30])]
        prompt = stem + some(rng.choice([0, 1, 20, 50]), index)
        params = SamplingParams(
            temperature=0.8 * (index % 4 == 0),
            seed=index,
            max_tokens=rng.randint(1, 20),
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield {"prompt_token_ids": prompt}, params


class Known:
    """What must be in a cache of one request after the other, told from their texts."""

    def __init__(self, usual: int, shift: int):
        self.usual, self.shift, self.blocks = usual, shift, set()

    def hit(self, prompt, params, got) -> int:
        extra, ids = params.extra_args or {}, prompt["prompt_token_ids"]
        width, text = extra.get("dlm_block_length", self.usual), [*ids, *got]
        if extra.get("dlm_cfg_scale") or width not in (4, 8, 32):
            return 0
        final, hit = len(ids) // width * width - self.shift, 0  # a shifted model reads the last row again
        while hit + SIZE <= final and (width, *text[: hit + SIZE]) in self.blocks:
            hit += SIZE
        # the last block is not read again once it is finished
        written = (len(text) - 1) // width * width
        self.blocks |= {(width, *text[:end]) for end in range(SIZE, written + 1, SIZE)}
        return hit
