"""Every Triton kernel is compiled ahead of time for the GPUs named here, as its launcher would launch it: without
spills, within the registers of a thread and the shared memory of a block.

No GPU takes part: launches are caught before they reach one, and their arguments tell what would be compiled.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.devices import fake_gpu
from tests.kernels.launches import CASES, RARER, Launching

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
    torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """What the launchers below would run: (kernel, its arguments by name, its options)."""
    caught = []

    def run(kernel, *args, grid, warmup, **kwargs):
        assert all(0 < extent < limit for extent, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=False))
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        caught.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in RARER)])
def test_compiles_without_spills(case, target, launches, record_property):
    with fake_gpu(), Launching():
        (CASES | RARER)[case]()()
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
