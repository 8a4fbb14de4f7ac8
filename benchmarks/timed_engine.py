"""One vLLM engine under measurement, in vLLM's own multiprocess mode.

vLLM binds its worker's threads from the environment; the reference loop's
process is given the same OpenMP on the same cores.
"""

import gc
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import worker_hooks
from benchmarks.checkpoints import Shape
from benchmarks.workload import BLOCK, Cell


def cores(threads: int) -> list[int]:
    return sorted(os.sched_getaffinity(0))[:threads]


def pinned() -> bool:
    """Unless told not to: two engines that are pinned to the same cores slow each other manifold."""
    return os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind"


def engine_environment(threads: int) -> dict[str, str]:
    # Left to itself vLLM keeps a core for its scheduler, half of a machine of two.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores(threads)))}
    return (binding if pinned() else {"OMP_NUM_THREADS": str(threads)}) | {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the worker_hooks is sent to the worker as a function
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }


def loop_environment(threads: int) -> dict[str, str]:
    """What vLLM gives its worker: torch's own OpenMP, one thread bound to each core."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    preload = [os.environ.get("LD_PRELOAD"), str(library) if library.exists() else None]
    affinity = {"GOMP_CPU_AFFINITY": " ".join(map(str, cores(threads)))} if pinned() else {}
    return affinity | {
        "OMP_NUM_THREADS": str(threads),
        "LD_PRELOAD": ":".join(filter(None, preload)),
    }


class Engine:
    def __init__(self, folder: Path, shape: Shape, server: dict, cells: list[Cell], threads: int):
        os.environ.update(engine_environment(threads))
        from vllm import LLM

        rows = max(cell.rows() for cell in cells)
        self.shape = shape
        self.names = itertools.count()
        self.llm = LLM(
            str(folder),
            dtype="bfloat16",
            additional_config={"dlm": server},
            max_model_len=max(max(cell.lengths()) + cell.new for cell in cells),
            max_num_seqs=max(cell.batch for cell in cells),
            max_num_batched_tokens=rows,
            # keys and values of every row, as much again for what policies keep of it, and slack per request
            kv_cache_memory_bytes=2
            * 2
            * shape.layers
            * shape.width
            * (2 * rows + 512 * (2 + max(c.batch for c in cells))),
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        (used,) = self.llm.collective_rpc(worker_hooks.threads)
        if used != threads:
            raise RuntimeError(f"the worker computes with {used} threads instead of {threads}")
        self.llm.collective_rpc(worker_hooks.install)

    def measure(self, cell: Cell, request: dict, repetitions: int, seconds: float) -> list[dict]:
        """Per repetition: seconds and what the worker_hooks counted."""
        prompts = cell.prompts(self.shape)
        # Few steps of the first block meet the large shapes once, which warms allocators and oneDNN's caches.
        self._deliver(prompts, replace(cell, blocks=1), request, max(1, min(2, cell.steps_per_block // 2)))
        runs = []
        while len(runs) < repetitions and sum(run["seconds"] for run in runs) < seconds:
            self.llm.collective_rpc(worker_hooks.start, args=(cell.batch, cell.blocks * BLOCK))
            elapsed = self._deliver(prompts, cell, request, cell.steps_per_block)
            (counts,) = self.llm.collective_rpc(worker_hooks.take)
            runs.append({"seconds": elapsed} | counts)
        return runs

    def _deliver(self, prompts: list[list[int]], cell: Cell, request: dict, steps_per_block: int) -> float:
        """Seconds until every request has delivered the awaited blocks."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = {"dlm_steps": steps_per_block * cell.new // BLOCK, "dlm_block_length": BLOCK} | request
        params = SamplingParams(
            temperature=0,
            max_tokens=cell.new,
            ignore_eos=True,
            extra_args=options,
            output_kind=RequestOutputKind.DELTA,
        )
        engine = self.llm.llm_engine
        self.llm.sleep(level=0)  # requests queue up, none starts before the last is there
        begin = time.perf_counter()
        missing, names = {}, []
        for ids in prompts:
            name = str(next(self.names))
            names.append(engine.add_request(name, {"prompt_token_ids": ids}, params))
            missing[name] = cell.blocks * BLOCK
        self.llm.wake_up(tags=["scheduling"])
        while any(tokens > 0 for tokens in missing.values()):
            for output in engine.step():
                missing[output.request_id] -= len(output.outputs[0].token_ids)
        elapsed = time.perf_counter() - begin
        if cell.blocks * BLOCK < cell.new:
            engine.abort_request(names, internal=True)
        elif any(missing.values()) or engine.has_unfinished_requests():
            raise RuntimeError(f"{cell.new} tokens were asked for, {missing} of them came back too few (or too many)")
        return elapsed

    def close(self) -> None:
        """Frees cores and memory for whoever is measured next."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
