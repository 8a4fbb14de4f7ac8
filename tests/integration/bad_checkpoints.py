"""Copies of golden checkpoints that are wrong in one thing, and the line with which vLLM's front-end refuses them."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.conftest import GOLDEN
from tests.integration.refusals import line_of

LLADA, DREAM, MOE, SDAR, LLADA2 = "llada-tiny", "dream-tiny", "lladamoe-tiny", "sdar-tiny", "llada2-tiny"
A2D_QWEN3, A2D_QWEN2, A2D_LLAMA = "a2d-qwen3-tiny", "a2d-qwen2-tiny", "a2d-llama-tiny"
RND1, DIFFCODER, FAST_V2 = "rnd1-tiny", "stable-diffcoder-tiny", "fast-dllm-v2-tiny"
ARCHITECTURE = {
    LLADA: "LLaDAModelLM",
    DREAM: "DreamModel",
    MOE: "LLaDAMoEModelLM",
    SDAR: "SDARForCausalLM",
    LLADA2: "LLaDA2MoeModelLM",
    A2D_QWEN3: "A2DQwen3LMHeadModel",
    A2D_QWEN2: "A2DQwen2LMHeadModel",
    A2D_LLAMA: "A2DLlamaLMHeadModel",
    RND1: "RND1",
    DIFFCODER: "StableDiffcoderForCausalLM",
    FAST_V2: "Fast_dLLM_QwenForCausalLM",
}


def copied(name: str, folder, config=None, tensors=None):
    """The checkpoint with some fields changed (None: left out) and `tensors` applied to its weights."""
    path = folder / name
    shutil.copytree(GOLDEN / "checkpoints" / name, path)
    if config is not None:
        fields = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    if tensors is not None:
        weights = load_file(path / "model.safetensors")
        tensors(weights)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def refused_config(path, **settings) -> str:
    with pytest.raises(ValueError) as refused:
        AsyncEngineArgs(str(path), max_model_len=128, **settings).create_engine_config()
    return line_of(refused.value).removeprefix("  Value error, ")
