"""An autoregressive model with a selection, served by vLLM's worker and second model runner for GPUs; their Triton
kernels run in the interpreter, the project's own page kernels in their way on CPUs."""

import tempfile
from pathlib import Path

import torch

import vllm_dlm

NEW = 6
#: what a log-probability in bfloat16 is off by, from float64
ROUNDED = 0.1


def run() -> None:
    vllm_dlm.register()
    from tests.pretended_gpu.worker import on_cpu, without_streams
    from vllm_dlm.page_sparse.selecting_worker import SelectingGPUWorker

    on_cpu(SelectingGPUWorker)
    without_streams()
    with tempfile.TemporaryDirectory() as folder:
        serve(Path(folder))


def serve(folder: Path) -> None:
    from vllm import LLM
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from tests.page_sparse import conftest, models
    from tests.page_sparse.reference import Reference
    from tests.pretended_gpu.operators import FLASH_CALLS
    from vllm_dlm.page_sparse.selecting_worker import SelectingGPUWorker

    checkpoint = models.write("llama", folder)
    llm = LLM(
        str(checkpoint), dtype="bfloat16", max_model_len=512, enforce_eager=True, kv_cache_memory_bytes=1 << 24,
        max_num_seqs=4, max_num_batched_tokens=256, skip_tokenizer_init=True, disable_log_stats=True,
        additional_config={"dlm": {"selection": conftest.SPARSE}},
    )  # fmt: skip
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert isinstance(worker, SelectingGPUWorker) and isinstance(worker.model_runner, GPUModelRunner)
    asked = conftest.prompts(150, 40)
    FLASH_CALLS.clear()
    got = conftest.decode(llm, asked, NEW)
    chosen, whole = (Reference(checkpoint, page_size=16, budget_tokens=n, dense_layers=(0,)) for n in (64, 4096))
    for prompt, run in zip(asked, got, strict=True):
        assert len(run) == NEW and apart(chosen, prompt, run) < ROUNDED
    assert apart(whole, asked[0], got[0]) > 2 * ROUNDED
    assert FLASH_CALLS, "prompts are read by FlashAttention"
    # three layers choose; the first token of each is its prompt's
    rows = 3 * (NEW - 1)
    assert conftest.counted(llm) == {
        "sparse_rows": rows, "dense_rows": rows, "pages_read": rows * (4 + 3), "pages_seen": rows * (10 + 3)
    }  # fmt: skip


def apart(reference, prompt: list[int], run: list[tuple[int, float]]) -> float:
    """How far the log-probabilities of these tokens are from the reference's, which is fed with them."""
    reference.cache, reference.left_out = [None] * reference.config["num_hidden_layers"], 0
    fed, worst = prompt, 0.0
    for i, (token, logprob) in enumerate(run):
        want = reference._forward(torch.tensor(fed), generated=i > 0).log_softmax(-1)
        worst, fed = max(worst, abs(float(want[token]) - logprob)), [token]
    return worst
