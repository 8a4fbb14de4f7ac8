"""A golden request served by vLLM's worker for GPUs with the denoising runner in it."""

import json
import sys

import torch

import vllm_dlm

NAMES = ["llada.g32_b8_s16_t0", "llada.g30_b10_s12_t0_remainder", "llada.fastdllm_nocache_thr0.9"]


def run() -> None:
    event, stream = torch.cuda.Event, torch.cuda.Stream
    vllm_dlm.register()
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker

    from tests.conftest import start_engine
    from tests.pretended_gpu.worker import on_cpu
    from vllm_dlm.integration.worker.runner import DenoisingRunner
    from vllm_dlm.integration.worker.worker import DiffusionGPUWorker

    assert current_platform.is_cuda() and current_platform.get_device_capability() == (9, 0)
    on_cpu(DiffusionGPUWorker)
    llm = start_engine("llada-tiny")
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert isinstance(worker, DiffusionGPUWorker) and isinstance(worker, Worker)
    assert isinstance(worker.model_runner, DenoisingRunner)
    serve(llm)
    # its first import replaces these
    assert "vllm.v1.worker.cpu_worker" not in sys.modules
    assert torch.cuda.Event is event and torch.cuda.Stream is stream


def serve(llm) -> None:
    from tests.conftest import GOLDEN
    from tests.engine.test_golden import requests_of

    runs = json.loads((GOLDEN / "runs.json").read_text())["runs"]
    rows = [(name, *row) for name in NAMES for row in requests_of(name, runs[name])]
    outputs = llm.generate([row[1] for row in rows], [row[2] for row in rows], use_tqdm=False)
    for (name, _, _, expected), output in zip(rows, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == expected, name
