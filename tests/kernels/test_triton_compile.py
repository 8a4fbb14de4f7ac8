"""Compiles every Triton kernel ahead of time for the GPUs listed here, as its launcher would launch it, and checks that
registers do not spill and that shared memory suffices. `make test` compiles for sm_90, `make test-slow` for the others.

No GPU is needed: launches are intercepted, and their arguments determine what would be compiled.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.devices import fake_gpu
from tests.kernels.launches import CASES, RARER, Launching
from tests.tiers import slow

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from tests.kernels.caught import catch_launches, source  # noqa: E402

# shared memory of one block, in bytes
TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
TIERED_TARGETS = ["sm_90", *slow("sm_80", "gfx942")]


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def launches(monkeypatch, triton_cache):
    """Launches that the tests below intercept."""
    caught = catch_launches(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton_cache))
    return caught


def resources(compiled, target):
    """-> registers and spills per thread"""
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        # scalar registers spill to lanes of vector registers, not to memory
        used = {name: int(value) for name, value in re.findall(r"\.(vgpr_(?:spill_)?count):\s*(\d+)", assembly)}
        return used["vgpr_count"], used["vgpr_spill_count"]
    cubin = Path(triton.knobs.cache.dir) / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return used["REG"], used["STACK"] + used["LOCAL"]


@pytest.mark.parametrize("target", TIERED_TARGETS)
@pytest.mark.parametrize("case", [*CASES, *slow(*RARER)])
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
