"""python -m tests.pretended_gpu [PART …]"""

import os
import sys
import time
import traceback
from importlib import import_module

PARTS = ("denoising", "quantized", "canvas_attention", "page_sparse", "decoding")


def main(parts: list[str]) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "TRITON_INTERPRET": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from tests.pretended_gpu import hopper, operators

    hopper.pretend()
    operators.register()
    import vllm

    print(f"vLLM {vllm.__version__} in {vllm.__path__[0]}")
    for part in parts:
        began = time.monotonic()
        import_module(f"tests.pretended_gpu.{part}").run()
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    failed = 0
    try:
        main(sys.argv[1:] or list(PARTS))
    except Exception:
        failed = 1
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(failed)  # vLLM would ask the device to let go of its memory
