"""The device: what it reaches at most, how long a call takes, how often the host launches work or waits for it."""

import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from benchmarks.lib.bounds import Peaks

#: part of the device's name -> bytes/s and dense bfloat16 FLOP/s of its datasheet; the longest part that fits counts
DATASHEETS = {
    "B200": (8.0e12, 2250e12),
    "GH200": (4.0e12, 989e12),
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "H100 PCIe": (2.0e12, 756e12),
    "H100 NVL": (3.9e12, 835e12),
    "H20": (4.0e12, 148e12),
    "A100": (1.56e12, 312e12),
    "A100-SXM4-80GB": (2.04e12, 312e12),
    "A100 80GB": (1.94e12, 312e12),
    "L40S": (0.864e12, 362e12),
    "L4": (0.3e12, 121e12),
    "A10": (0.6e12, 125e12),
    "RTX 4090": (1.008e12, 165e12),
    "RTX 3090": (0.936e12, 71e12),
}

#: beginnings of the names that CUDA's runtime and driver interfaces use in a profile
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchCooperativeKernel", "cuLaunchKernel")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemsetD")
GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")
WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    *("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"),
)
BLOCKING = ("cudaMemcpy", "cudaMemcpy2D", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2")  # whole names, not …Async


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(seconds: float = 1.0) -> dict:
    """Name, memory, datasheet, and what is reached here."""
    here = device()
    name = torch.cuda.get_device_name() if here.type == "cuda" else "CPU"
    found = {"name": name, "measured": measured(here, seconds)}
    if here.type == "cuda":
        found["memory_gib"] = round(torch.cuda.get_device_properties(here).total_memory / 2**30, 1)
    sheet = datasheet(name)
    return found | ({"datasheet": {"bytes_per_s": sheet[0], "flops_per_s": sheet[1]}} if sheet else {})


def datasheet(name: str) -> tuple[float, float] | None:
    # The longest part first: "L4" is also in "L40S".
    fitting = [part for part in sorted(DATASHEETS, key=len, reverse=True) if part in name]
    return DATASHEETS[fitting[0]] if fitting else None


def peaks(found: dict) -> Peaks:
    """The datasheet's peaks, if it is known; what is reached here is less."""
    sheet, here = found.get("datasheet"), found["measured"]
    if sheet:
        return Peaks(sheet["bytes_per_s"], sheet["flops_per_s"])
    return Peaks(max(here["read_bytes_per_s"], here["copy_bytes_per_s"]), here["flops_per_s"])


def measured(here: torch.device, seconds: float) -> dict[str, float]:
    """By a sum and a copy of more than any cache holds (a copy reads and writes), and by a large product"""
    large, size = (1 << 31, 8192) if here.type == "cuda" else (1 << 26, 512)
    source = torch.ones(large // 8, dtype=torch.int64, device=here)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=here).to(torch.bfloat16) for _ in range(2))

    def per_second(amount: float, function) -> float:
        return float(f"{amount / (call_ms(function, here, seconds) / 1000):.4g}")

    return {
        "read_bytes_per_s": per_second(large, source.sum),
        "copy_bytes_per_s": per_second(2 * large, lambda: target.copy_(source)),
        "flops_per_s": per_second(2 * size**3, lambda: a @ b),
    }


def call_ms(function: Callable, here: torch.device, seconds: float) -> float:
    """Median milliseconds of a call: on a GPU inside a CUDA graph, as a server launches it."""
    if here.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(function, rep=int(1000 * seconds), return_mode="median")
    from torch.utils.benchmark import Timer

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    timer.timeit(2)
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median


def counted_calls(names: Iterable[str]) -> dict[str, int]:
    """Names of a profile's events -> launches, graph launches, copies, waits"""
    counts = Counter(names)

    def starting(beginnings: tuple[str, ...]) -> int:
        return sum(number for name, number in counts.items() if name.startswith(beginnings))

    found = {"launches": starting(LAUNCHES), "graph_launches": starting(GRAPHS), "copies": starting(COPIES)}
    return found | {"waits": starting(WAITS) + sum(counts[name] for name in BLOCKING)}


class Profile:
    """Steps first … last - 1 under torch.profiler: `begin_step(index)` before each step, `found()` at the end."""

    def __init__(self, first: int, last: int):
        self.first, self.last, self.names, self.profiler, self.steps = first, last, [], None, 0

    def begin_step(self, index: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        if index == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.profiler = profile(activities=activities)
            self.profiler.start()
        if self.profiler is not None:
            if index == self.last:
                self.stop()
            else:
                self.steps += 1

    def stop(self) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.names = [event.name for event in self.profiler.events()]
            self.profiler = None

    def found(self) -> dict[str, float]:
        """Per step; empty without a GPU."""
        self.stop()
        if not self.steps or not torch.cuda.is_available():
            return {}
        return {name: number / self.steps for name, number in counted_calls(self.names).items()}


def mark():
    """A moment; on a GPU that at which everything launched so far is done."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin, end) -> float:
    """Between two moments that have passed."""
    return 1000 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)
