"""One vLLM engine under measurement, in vLLM's own multiprocess mode.

Environment first: vLLM reads thread binding when its worker starts, and the
reference loop is started with the same variables.
"""

import gc
import os
import time
from pathlib import Path

from benchmarks import probe
from benchmarks.checkpoints import Shape


def thread_environment(threads: int) -> dict[str, str]:
    """The same OpenMP on the same cores for whoever is measured.

    Left to itself vLLM keeps a core for its scheduler, half of a machine of two.
    """
    import torch

    cores = sorted(os.sched_getaffinity(0))[:threads]
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(threads),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
    }
    if library.exists() and "libgomp" not in os.environ.get("LD_PRELOAD", ""):
        # vLLM preloads torch's OpenMP into its worker, so the loop gets it, too.
        environment["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    return environment


class Engine:
    def __init__(self, folder: Path, shape: Shape, server: dict, cells: list, threads: int):
        os.environ.update(
            thread_environment(threads),
            VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # the probe is sent to the worker as a function
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
            VLLM_NO_USAGE_STATS="1",
        )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM

        rows = max(cell.rows() for cell in cells)
        self.shape = shape
        self.llm = LLM(
            str(folder),
            dtype="bfloat16",
            additional_config={"dlm": server},
            max_model_len=max(max(cell.lengths()) + cell.new for cell in cells),
            max_num_seqs=max(cell.batch for cell in cells),
            max_num_batched_tokens=rows,
            # keys and values of every row, and a page of slack per request
            kv_cache_memory_bytes=2 * 2 * shape.layers * shape.width * (rows + 256 * (1 + max(c.batch for c in cells))),
            disable_log_stats=True,
        )
        (used,) = self.llm.collective_rpc(probe.threads)
        if used != threads:
            raise RuntimeError(f"the worker computes with {used} threads instead of {threads}")
        self.llm.collective_rpc(probe.install)

    def measure(self, cell, request: dict, block: int, repetitions: int, seconds: float) -> list[dict]:
        """Per repetition: seconds, tokens delivered and what the probe counted."""
        prompts = [{"prompt_token_ids": ids} for ids in cell.prompts(self.shape)]
        # Few steps per block meet every shape of the exact engine once; allocators and oneDNN's caches are warm then.
        self._generate(prompts, cell.new, block, steps=2 * cell.new // block, request=request)
        runs = []
        while len(runs) < repetitions and sum(run["seconds"] for run in runs) < seconds:
            self.llm.collective_rpc(probe.take)
            begin = time.perf_counter()
            tokens = self._generate(prompts, cell.new, block, steps=cell.new, request=request)
            elapsed = time.perf_counter() - begin
            (counts,) = self.llm.collective_rpc(probe.take)
            if tokens != cell.batch * cell.new:
                raise RuntimeError(f"{tokens} tokens came back instead of {cell.batch * cell.new}")
            runs.append({"seconds": elapsed, "tokens": tokens} | counts)
        return runs

    def _generate(self, prompts: list, new: int, block: int, steps: int, request: dict) -> int:
        from vllm import SamplingParams

        options = {"dlm_steps": steps, "dlm_block_length": block} | request
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, extra_args=options)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def close(self) -> None:
        """Frees cores and memory for whoever is measured next."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
