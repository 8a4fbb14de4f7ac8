"""Every Triton kernel is compiled ahead of time for the GPUs named here, as its launcher would launch it: without
spills, within the registers of a thread and the shared memory of a block.

No GPU takes part: launches are caught before they reach one, and their arguments tell what would be compiled.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from vllm_dlm.kernels.haar_pyramid import PageStatistics

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# shared memory of one block, in bytes
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """What the launchers below would run: (kernel, its arguments by name, its options)."""
    caught = []

    def run(kernel, *args, grid, warmup, **kwargs):
        assert all(0 < extent < limit for extent, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=False))
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        caught.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return caught


def source(kernel, arguments):
    """Specialised as at a launch: on integers of 1, and on addresses and integers that 16 divides."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 1 << 31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(compiled, target):
    """-> registers and spills of a thread"""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        # scalar registers that do not suffice go to lanes of vector registers, not to memory
        used = {name: int(value) for name, value in re.findall(r"\.(vgpr_(?:spill_)?count):\s*(\d+)", assembly)}
        return used["vgpr_count"], used["vgpr_spill_count"]
    cubin = Path(triton.knobs.cache.dir) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def cache(dim=128, kv_heads=8, dtype=torch.bfloat16, blocks=64, block_size=64):
    return torch.empty(blocks, kv_heads, block_size, 2 * dim, dtype=dtype, device="meta")


def meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_pyramid():
    from vllm_dlm.kernels.haar_pyramid.triton import haar_pyramid

    haar_pyramid(cache(), meta(16), 64, (1, 2, 6))


def launch_statistics(std_kind, **shape):
    from vllm_dlm.kernels.haar_pyramid.triton import store_statistics

    pages = cache(**shape)
    store_statistics(pages, meta(16), PageStatistics.empty(pages, pages.shape[2], std_kind))


def launch_top_pages(pages):
    from vllm_dlm.kernels.top_pages.triton import top_pages

    top_pages(meta(4, 8, pages, dtype=torch.float32), 32)


def launch_scores(std_kind, reduce, queries=4):
    from vllm_dlm.kernels.page_scores.triton import page_scores

    statistics = PageStatistics.empty(cache(), 64, std_kind)
    q = meta(queries, 32, 128, dtype=torch.bfloat16)
    page_scores(q, meta(5), statistics, meta(4, 2048), meta(4), meta(4), 1, 0.5, reduce)


def launch_attention(queries, causal=True, page_size=64, kept=32, group=4, **shape):
    from vllm_dlm.kernels.sparse_attention.triton import sparse_attention

    pages = cache(**shape)
    q = meta(4 * queries, 8 * group, pages.shape[3] // 2, dtype=pages.dtype)
    sparse_attention(q, meta(5), pages, meta(4, 2048), meta(4, 8, kept), meta(4), page_size, 0.1, causal)


CASES = {
    "pyramid": launch_pyramid,
    "statistics": lambda: launch_statistics("l2"),
    "statistics of large pages": lambda: launch_statistics("diag2", block_size=128, dim=256),
    "scores": lambda: launch_scores("l2", "max"),
    "scores of many queries": lambda: launch_scores("l2", "max", 4 * 32),
    "scores by channel": lambda: launch_scores("vector", "mean", 4 * 32),
    "normalised scores": lambda: launch_scores("diag2", "softmax_sum"),
    "top pages": lambda: launch_top_pages(512),
    "top pages of long rows": lambda: launch_top_pages(16384),
    "attention": lambda: launch_attention(1),
    "attention of a block": lambda: launch_attention(32, causal=False),
    "attention over single keys": lambda: launch_attention(8, page_size=1, kept=2048, group=1),
    "attention of wide heads": lambda: launch_attention(32, dim=256),
    "attention in float32": lambda: launch_attention(32, dtype=torch.float32),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(case, target, launches, record_property):
    CASES[case]()
    assert launches
    gpu, memory = TARGETS[target]
    for kernel, arguments, options in launches:
        compiled = triton.compile(source(kernel, arguments), target=gpu, options=options)
        registers, spills = resources(compiled, gpu)
        line = f"{kernel.__name__}: {registers} registers, {spills} spilled, {compiled.metadata.shared} bytes shared"
        record_property("resources", line)
        print(target, case, options, line)
        assert registers <= (512 if gpu.backend == "hip" else 255) and spills == 0, line
        assert compiled.metadata.shared <= memory, line
