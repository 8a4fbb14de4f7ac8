"""Loads checkpoints in the worker of the session's engine, in addition to its own model."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors import safe_open
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.integration.bad_checkpoints import ARCHITECTURE, LLADA
from vllm_dlm.models import checkpoint

CONFIGURED: dict[tuple, VllmConfig] = {}


def configured(path: str, **settings) -> VllmConfig:
    """vLLM's configuration of this checkpoint. Checkpoints that differ in other tensors alone share it."""
    settings = {"max_model_len": 128, "dtype": "float32"} | settings
    weights = Path(path, "model.safetensors")
    with safe_open(weights, "pt") if weights.exists() else nullcontext() as file:
        head = file is not None and "lm_head.weight" in file.keys()  # noqa: SIM118 - whether a head is tied depends on it
    key = Path(path, "config.json").read_text(), head, *settings.items()
    if key not in CONFIGURED:
        CONFIGURED[key] = AsyncEngineArgs(path, **settings).create_engine_config()
    CONFIGURED[key].model_config.model = path
    CONFIGURED[key].compilation_config.static_forward_context.clear()  # the layers of the model before
    return CONFIGURED[key]


def load(worker, path: str, updates=(), **settings):
    """Loads a checkpoint as a worker does -> (error, warnings, the names it must have)."""
    from vllm.model_executor.model_loader import get_model

    config = configured(path, **settings)
    with patch.object(checkpoint.logger, "warning") as warned, set_current_vllm_config(config):
        try:
            model = get_model(vllm_config=config)
            for update in updates:
                model.load_weights(update)
        except ValueError as error:
            return str(error), warned, None
    return None, warned, model.checkpoint.wanted


@pytest.fixture
def loaded(engines):
    def loaded(path, **settings):
        (outcome,) = engines(LLADA).collective_rpc(load, args=(str(path),), kwargs=settings)
        return outcome

    return loaded


@pytest.fixture
def refused(loaded):
    def refused(path, name: str, tensor: str, **settings) -> str:
        error, _, _ = loaded(path, **settings)
        assert error is not None and "\n" not in error
        assert error.startswith(f"{ARCHITECTURE[name]}: ") and tensor in error
        return error

    return refused
