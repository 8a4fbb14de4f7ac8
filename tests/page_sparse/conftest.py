"""Engines of small autoregressive models, started once each."""

import json
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.page_sparse import models

#: pages of 16 tokens, of which four are read, in all layers except the first
SPARSE = {"name": "unique", "page_size": 16, "budget_tokens": 64, "min_context": 0, "dense_layers": [0]}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    written = {}

    def get(name: str):
        if name not in written:
            written[name] = models.write(name, tmp_path_factory.mktemp(name))
        return written[name]

    return get


@pytest.fixture(scope="session")
def decoder(checkpoints):
    """decoder(model, selection or None, **settings) -> an engine, kept for the session."""
    from vllm import LLM

    started = {}

    def get(model: str, selection: dict | None = None, **settings):
        key = json.dumps([model, selection, settings], sort_keys=True)
        if key not in started:
            options = {
                "dtype": "float32",
                "max_model_len": 1024,
                "block_size": 32,
                "enforce_eager": True,
                "kv_cache_memory_bytes": 1 << 24,
                "max_num_seqs": 16,
                "skip_tokenizer_init": True,
                "disable_log_stats": True,
            } | settings
            if selection:
                options["additional_config"] = {"dlm": {"selection": selection}}
            started[key] = LLM(str(checkpoints(model)), **options)
        return started[key]

    return get


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(models.SHAPE["vocab_size"]) for _ in range(n)] for n in lengths]


def decode(llm, asked: list[list[int]], new: int = 24) -> list[list[tuple[int, float]]]:
    """Greedy (token, log-probability) pairs of each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
    return [
        [
            (token, step[token].logprob)
            for token, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
        ]
        for o in outputs
    ]


def tokens(runs) -> list[list[int]]:
    return [[token for token, _ in run] for run in runs]


def counted(llm, before: dict | None = None) -> dict:
    (counts,) = llm.collective_rpc("dlm_page_counts")
    return {name: value - (before or {}).get(name, 0) for name, value in counts.items()}


@contextmanager
def selecting(llm, **fields):
    """Context in which the engine's selection has other fields. Stored summaries must not depend on these fields."""
    (own,) = llm.collective_rpc(use_selection, args=(fields,))
    yield llm
    llm.collective_rpc(use_selection, args=({name: getattr(own, name) for name in fields},))


def use_selection(worker, fields: dict):
    before, after = worker.dlm_selection, replace(worker.dlm_selection, **fields)
    worker.dlm_selection = after
    for layer in worker._choosing().values():
        layer.impl.selection = after
    for group in (group for groups in worker.model_runner.attn_groups for group in groups):
        for builder in group.metadata_builders:
            if hasattr(builder, "selection"):
                builder.selection = after
    return before
