"""What a run on a GPU measures, the most telling cells first, with minutes as an H100 is expected to take them."""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks import gpu_cases
from benchmarks.gpu_correctness import REUSE, TESTS, Golden, GoldenReuse, Graphs, Kernel, RulesInGraphs, Tests
from benchmarks.gpu_denoising import Canvases
from benchmarks.gpu_denoising import Engine as Denoising
from benchmarks.gpu_kernels import Place
from benchmarks.gpu_pages import Decoding
from benchmarks.gpu_pages import Engine as PageSparse
from benchmarks.gpu_parts import Cell, Part
from benchmarks.gpu_rules import Engine as Rules
from benchmarks.gpu_rules import Rule
from benchmarks.speed_rules import methods as rules

POLICIES = ("fast_dllm/dual", "none", "dllm_cache", "dyllm", "fast_dllm/prefix", "fast_dllm/dual+wavefilter/serve")
PROMPTS, REQUESTS = (1024, 256, 4096), (1, 32, 8, 64)
#: minutes
STARTING = {"vLLM's default": 2.5, "graphs": 1.2, "eager": 1.0}
#: (tokens of context, requests); pages are chosen from 8,192 tokens on
LONG = [
    (131072, 1), (32768, 8), (131072, 8), (32768, 1), (8192, 1), (8192, 8), (65536, 1), (65536, 8), (16384, 1),
    (16384, 8),
]  # fmt: skip


def plan(compiling: str = "vLLM's default") -> list[Part]:
    kernels = Part("correctness", "kernels", 0.2, tuple(kernel_checks()), vllm=False)
    telling = [(32768, 8), (131072, 1), (131072, 8), (32768, 1), (32768, 32)]
    further = [(8192, 1), (8192, 8), (8192, 32), (16384, 8), (65536, 8)]
    llada, dream = ([*canvases(shape)] for shape in ("llada-8b", "dream-7b"))
    return [
        kernels,
        Part("kernels", "UNIQUE attention", 0.2, tuple(places(telling)), vllm=False),
        denoising("llada-8b", "first", first(llada)),
        Part("correctness", "recorded runs", 0.3, (
            *(Cell(name, 0.1, Golden(name)) for name in ("llada-tiny", "dream-tiny", "llada-tiny-gqa")),
            *(Cell(name, 0.1, GoldenReuse(name)) for name in REUSE),
        )),
        Part("correctness", "graphs", 0.3, tuple(
            Cell(f"{name} {dtype}", 0.3, Graphs(name, dtype))
            for dtype in ("float32", "bfloat16") for name in ("llada-tiny", "dream-tiny")
        )),
        Part("correctness", "graphs of blocks and experts", 0.3, (
            Cell("sdar-tiny bfloat16", 0.3, Graphs("sdar-tiny", "bfloat16", ("none",))),
            Cell("llada2-tiny bfloat16", 0.3, Graphs("llada2-tiny", "bfloat16", ("none",))),
            Cell("lladamoe-tiny bfloat16", 0.3, Graphs("lladamoe-tiny", "bfloat16")),
        )),
        Part("correctness", "graphs of decodings", 0.3, tuple(
            Cell(f"{name} bfloat16, decodings", 0.8, RulesInGraphs(name, "bfloat16"))
            for name in ("llada-tiny", "dream-tiny")
        )),
        Part("rules", "the demo in llada-8b", 1.0, tuple(decodings((1, 8))), Rules("llada-8b", 8)),
        Part("correctness", "tests", 0.1, tuple(Cell(f"tests {file}", 1.0, Tests(file)) for file in TESTS)),
        denoising("llada-8b", "eager", [
            replace(cell, name=f"{cell.name} eager") for cell in llada
            if cell.what.prompt == 1024 and cell.what.requests in (1, 32) and cell.what.policy == "fast_dllm/dual"
        ], eager=True),
        *pages("llama-3-8b", "first", LONG[:2], compiling),
        denoising("dream-7b", "first", first(dream)),
        *pages("qwen2.5-7b", "first", LONG[:2], compiling),
        denoising("llada-8b", "rest", rest(llada)),
        *pages("llama-3-8b", "rest", LONG[2:], compiling),
        *pages("qwen2.5-7b", "rest", LONG[2:], compiling),
        Part("kernels", "UNIQUE attention, further", 0.2, tuple(places(further)), vllm=False),
        denoising("dream-7b", "rest", rest(dream)),
    ]  # fmt: skip


def toy() -> list[Part]:
    """All of it in small, for a CPU."""
    canvas = [
        Cell(f"{shape} {policy} x{requests}", 0.1, Canvases(policy, 48, requests, 32, steps, 0.0))
        for shape, policies in (("toy-llada", ("fast_dllm/dual", "none", "dyllm")), ("toy-dream", ("fast_dllm/dual",)))
        for policy in policies for requests in (1, 2)
        for steps in (None if (shape, policy, requests) == ("toy-llada", "fast_dllm/dual", 1) else 4,)
    ]  # fmt: skip
    selection = {"name": "unique", "page_size": 32, "budget_tokens": 256, "min_context": 0}
    parts = [
        Part("correctness", "kernels", 0.2, tuple(kernel_checks()), vllm=False),
        Part("kernels", "UNIQUE attention", 0.1, tuple(places([(2048, 1)], 0.02)), vllm=False),
        *(
            Part("denoising", shape, 0.2, tuple(c for c in canvas if shape in c.name), Denoising(shape, 512, 4, 128))
            for shape in ("toy-llada", "toy-dream")
        ),
        Part("correctness", "recorded runs", 0.2, (
            Cell("llada-tiny", 0.1, Golden("llada-tiny")), Cell(REUSE[0], 0.1, GoldenReuse(REUSE[0])),
        )),
        Part("correctness", "graphs", 0.2, (
            Cell("llada-tiny float32", 0.1, Graphs("llada-tiny", "float32", ("none", "fast_dllm/dual"), (13,), 8)),
        )),
    ]  # fmt: skip
    of_rules = tuple(cell for cell in decodings((1,)) if "8" not in cell.name and "prefix" not in cell.name)
    parts.append(Part("rules", "the demo in toy-demo", 0.2, of_rules, Rules("toy-demo", 1, 192, 32)))
    for method, chosen in (("dense", None), ("unique", selection)):
        cells = [
            Cell(f"toy {method} {context} x{requests}", 0.1, Decoding(context, requests, 12, 1))
            for context, requests in ((1024, 1), (2048, 2))
        ]  # fmt: skip
        engine = PageSparse("toy-llama", chosen, 2, 2304, "eager")
        parts.append(Part("pages", f"toy {method}", 0.2, tuple(cells), engine))
    return parts


def kernel_checks() -> Iterator[Cell]:
    for name in gpu_cases.folders():
        yield Cell(f"kernel {name}", 0.03, Kernel(name))


def places(wanted: list[tuple[int, int]], seconds: float = 1.0) -> Iterator[Cell]:
    for keys, batch in wanted:
        yield Cell(f"{keys} x{batch}", 0.2, Place(keys, batch, seconds))


def canvases(shape: str) -> Iterator[Cell]:
    for prompt in PROMPTS:
        for requests in REQUESTS:
            for policy in POLICIES:
                # The cost of a step of `none` does not change, and one of many long canvases takes seconds.
                what = Canvases(policy, prompt, requests, steps=6 if policy == "none" else None)
                rows = requests * (prompt + what.new)
                yield Cell(f"{shape} {policy} {prompt} x{requests}", 0.05 + rows / 3e5, what)


def decodings(requests: tuple[int, ...]) -> Iterator[Cell]:
    for count in requests:
        for method in rules(count):
            yield Cell(f"{method.label} x{count}", 0.1, Rule(method, count))


def first(cells: list[Cell]) -> list[Cell]:
    """One request and 32 at one prompt, the policies in order; those that a bar is about before all others."""
    own = [cell for cell in cells if cell.what.prompt == PROMPTS[0] and cell.what.requests in REQUESTS[:2]]
    return sorted(own, key=lambda cell: POLICIES.index(cell.what.policy))


def rest(cells: list[Cell]) -> list[Cell]:
    known = {cell.name for cell in first(cells)}
    return [cell for cell in cells if cell.name not in known]


def denoising(shape: str, name: str, cells: list[Cell], eager: bool = False) -> Part:
    longest = max(cell.what.prompt + cell.what.new for cell in cells)
    rows = min(
        36864,  # 32 canvases of 1,024 + 64 rows
        max(cell.what.requests * (cell.what.prompt + cell.what.new) for cell in cells),
    )
    engine = Denoising(shape, rows, max(cell.what.requests for cell in cells), longest, eager)
    return Part("denoising", f"{shape}, {name}", 1.0, tuple(cells), engine)


def pages(shape: str, name: str, places: list[tuple[int, int]], compiling: str) -> Iterator[Part]:
    """Chosen pages, then dense: both methods of a cell one after the other would take an engine each."""
    for method, selection in (("unique", {"name": "unique"}), ("dense", None)):
        cells = tuple(
            Cell(
                f"{shape} {method} {context} x{requests}", 0.05 + context * requests / 4e5, Decoding(context, requests)
            )
            for context, requests in places
        )
        longest = max(context for context, _ in places) + 128
        engine = PageSparse(shape, selection, max(requests for _, requests in places), longest, compiling)
        yield Part("pages", f"{shape} {method}, {name}", STARTING[compiling], cells, engine)
