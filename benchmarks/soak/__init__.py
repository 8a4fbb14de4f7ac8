"""Serves random requests for a long time and checks everything that must hold.

In process: batches of concurrent requests over every registered decoding, reuse, selection and preset, with aborts,
cache resets and hardly any memory, each answer compared with that of the request alone.
"""

import os
import sys
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    # One thread: a forked copy of the process has no other, and runs beside each other do not get in their way.
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpoint", action="append", help="more than one is served in turn; default: the tests'")
    parser.add_argument("--folder", type=Path, help="where to write the report instead of benchmarks/results")


def run(args) -> None:
    os.environ.update(ENVIRONMENT)
    from benchmarks.soak import process

    checkpoints = args.checkpoint or sorted(str(path) for path in process.CHECKPOINTS.iterdir())
    done, failure = process.soak(args.requests, args.seed, args.dtype, checkpoints)
    if failure:
        print(failure.found)
        print(f"after {failure.tried} smaller batches tried, {len(failure.batch.entries)} requests are left:\n")
        print(failure.python())
        sys.exit(1)
