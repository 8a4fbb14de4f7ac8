"""fp8 and int8 weights on vLLM's Cutlass kernels, whose products are torch's: joined projections give the tokens of
separate ones, and no answer depends on the other requests of its batch."""

import tempfile
from pathlib import Path

import vllm_dlm


def run() -> None:
    vllm_dlm.register()
    from tests.conftest import start_engine
    from tests.pretended_gpu.worker import on_cpu
    from tests.quantization.checkpoints import pair
    from vllm_dlm.integration.worker.worker import DiffusionGPUWorker

    on_cpu(DiffusionGPUWorker)
    small, _ = pair("dream-tiny", "int8", Path(tempfile.mkdtemp()))  # whose projections have a bias
    check(
        start_engine("llada-tiny", dtype="bfloat16", quantization="fp8_per_channel"), "CutlassFP8ScaledMMLinearKernel"
    )
    check(start_engine(str(small), dtype="bfloat16"), "CutlassInt8ScaledMMLinearKernel")


def check(llm, kernel: str) -> None:
    from tests.engine.batches import mixed_requests
    from tests.engine.running import runner_of, tokens
    from vllm_dlm.models.quantization import kernels_of

    model, given = runner_of(llm).model, list(mixed_requests(6))
    assert {type(found).__name__ for module in model.modules() for found in kernels_of(module)} == {kernel}
    # A worker joins the projections of a GPU, and its tensors claim to be the CPU's here.
    separate = tokens(llm, given)
    model.join_projections()
    assert all(layer.joined is not None for layer in model.model.layers)
    assert tokens(llm, given) == separate
    assert [tokens(llm, [request])[0] for request in given[:3]] == separate[:3]
