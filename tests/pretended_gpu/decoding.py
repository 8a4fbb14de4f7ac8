"""An autoregressive model with a selection, served by vLLM's worker and second model runner for GPUs, whose decoding
steps are graphs (graphs.py). vLLM's Triton kernels run in the interpreter, the page kernels as they do on CPUs."""

import tempfile
from pathlib import Path

import torch

import vllm_dlm
from tests.page_sparse import conftest, models
from tests.page_sparse.reference import Reference
from tests.pretended_gpu import graphs

NEW, CHUNK = 6, 256
#: error of a log-probability in float16, from float64
ROUNDED = 0.03


def run() -> None:
    vllm_dlm.register()
    from tests.pretended_gpu.worker import on_cpu, without_streams
    from vllm_dlm.integration.worker.selecting_worker import SelectingGPUWorker

    on_cpu(SelectingGPUWorker)
    without_streams()
    graphs.install()
    kernels_are_launches()
    with tempfile.TemporaryDirectory() as folder:
        serve(Path(folder))


def serve(folder: Path) -> None:
    from vllm import LLM
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from tests.pretended_gpu.operators import FLASH_CALLS
    from vllm_dlm.integration.worker.selecting_worker import SelectingGPUWorker

    checkpoint = models.write("llama", folder)
    llm = LLM(
        str(checkpoint),
        dtype="float16",
        max_model_len=512,
        kv_cache_memory_bytes=1 << 24,
        max_num_seqs=4,
        max_num_batched_tokens=CHUNK,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        additional_config={"dlm": {"selection": conftest.SPARSE}},
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 4]},
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert isinstance(worker, SelectingGPUWorker) and isinstance(worker.model_runner, GPUModelRunner)
    FLASH_CALLS.clear()
    chosen, whole = (Reference(checkpoint, page_size=16, budget_tokens=n, dense_layers=(0,)) for n in (64, 4096))
    long, short, one_more = clear_prompt(chosen, 150), conftest.prompts(40)[0], clear_prompt(chosen, CHUNK + 1)
    # two requests in the graph of four; then one whose last token of the prompt is a step of a single row by itself
    for asked, replays in (([long, short], NEW - 1), ([one_more], NEW)):
        before = graphs.Graph.replays
        runs = conftest.decode(llm, asked, NEW)
        assert graphs.Graph.replays - before == replays
        for prompt, run in zip(asked, runs, strict=True):
            assert len(run) == NEW and apart(chosen, prompt, run) < ROUNDED
        assert apart(whole, asked[0], runs[0]) > 2 * ROUNDED
    assert FLASH_CALLS, "prompts are read by FlashAttention"
    # three layers choose; the first token of each is its prompt's
    rows = 3 * (NEW - 1)
    assert conftest.counted(llm) == {
        "sparse_rows": 2 * rows,
        "dense_rows": rows,
        "pages_read": rows * (4 + 3 + 4),
        "pages_seen": rows * (10 + 3 + 17),
    }


def kernels_are_launches() -> None:
    from vllm_dlm.kernels.sparse_attention import naive
    from vllm_dlm.page_sparse import cuda
    from vllm_dlm.plugins.selection import pages, unique

    # as it is defined: the way of CPUs has no answer for the rows without keys that fill up a step
    cuda.sparse_attention = graphs.one_launch(naive.sparse_attention)
    unique.page_scores, unique.store_statistics = map(graphs.one_launch, (unique.page_scores, unique.store_statistics))
    pages.top_pages = graphs.one_launch(pages.top_pages)


def clear_prompt(reference: Reference, length: int) -> list[int]:
    """The prompt, of 40, whose pages and tokens are the clearest choices: rounding to float16 must not change one."""

    def margin(prompt: list[int]) -> float:
        reference.page_margin = reference.token_margin = float("inf")
        reference.generate(prompt, NEW)
        # Rounding moves scores by about 0.01 of their standard deviation, and log-probabilities by 0.01.
        return min(reference.page_margin, reference.token_margin)

    return max((conftest.prompts(length, seed=seed)[0] for seed in range(40)), key=margin)


def apart(reference, prompt: list[int], run: list[tuple[int, float]]) -> float:
    """How far the log-probabilities of these tokens are from the reference's, which is fed with them."""
    reference.cache, reference.left_out = [None] * reference.config["num_hidden_layers"], 0
    fed, worst = prompt, 0.0
    for i, (token, logprob) in enumerate(run):
        want = reference._forward(torch.tensor(fed), generated=i > 0).log_softmax(-1)
        worst, fed = max(worst, abs(float(want[token]) - logprob)), [token]
    return worst
