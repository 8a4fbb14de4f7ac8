"""What the denoising engine gives to FlashAttention: its tensors say that they are on a GPU, and the operator checks
its arguments as the kernel would."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch

import vllm_dlm

LIBRARY = torch.library.Library("vllm_dlm", "IMPL")
#: policies and selections whose attention is a call of its own
REQUESTS = (
    {"dlm_reuse": "none"},
    {"dlm_reuse": "fast_dllm/dual"},
    {"dlm_reuse": "fast_dllm/prefix"},
    {"dlm_reuse": "dllm_cache"},
    {"dlm_reuse": "dyllm"},
)


def run() -> None:
    vllm_dlm.register()
    from tests.conftest import golden_tensors, start_engine
    from tests.engine.worker_calls import states_of
    from tests.pretended_gpu.operators import FLASH_CALLS
    from tests.pretended_gpu.worker import on_cpu
    from vllm_dlm.integration.worker.worker import DiffusionGPUWorker
    from vllm_dlm.step import attention

    on_cpu(DiffusionGPUWorker)
    LIBRARY.impl("flash_attention", attention._launch, "CPU")
    llm = start_engine("llada-tiny-gqa", dtype="bfloat16", max_num_batched_tokens=1024, max_num_seqs=4)
    golden = golden_tensors("llada-tiny-gqa.logits")
    canvases = [golden[f"c{i}.input_ids"][0].tolist() for i in range(4)]
    (plain,) = llm.collective_rpc(states_of, args=(canvases,))
    assert not FLASH_CALLS
    with tensors_on_a_gpu():
        (flash,) = llm.collective_rpc(states_of, args=(canvases,))
    assert FLASH_CALLS, "FlashAttention was not called"
    for i in range(4):
        want = golden[f"c{i}.logits"][0]  # of float32
        rounding, error = (float((logits.float() - want).norm() / want.norm()) for _, logits in (plain[i], flash[i]))
        print(f"  canvas {i}: {error:.4f} from float32, {rounding:.4f} without FlashAttention")
        assert error < 1.2 * rounding
    for options in REQUESTS:
        before = len(FLASH_CALLS)
        served = serve(llm, options)
        calls = FLASH_CALLS[before:]
        print(f"  {options}: {len(calls)} calls of FlashAttention 3, {sum(served)} tokens")
        assert calls and not any(call["causal"] for call in calls)


def serve(llm, options: dict) -> list[int]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=16,
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_block_length": 8} | options,
    )
    prompts = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (40, 13)]
    with tensors_on_a_gpu():
        outputs = llm.generate(prompts, [params] * 2, use_tqdm=False)
    return [len(output.outputs[0].token_ids) for output in outputs]


@contextmanager
def tensors_on_a_gpu():
    torch.Tensor.is_cuda = property(says_it_is_on_a_gpu)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


def says_it_is_on_a_gpu(tensor: torch.Tensor) -> bool:
    """To all but the kernels, whose ways on CPUs are known to be right."""
    return Path(sys._getframe(1).f_code.co_filename).parent.parent.name != "kernels"
