"""Tokens per second of denoising, one token per step: per policy, against the published loop, the exact model and the
bound of each step. Random weights are never sure of a token, so several tokens per step are another suite: rules.py.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.lib.models import SHAPES, Shape, shape_of_checkpoint
from benchmarks.lib.process import loop_environment
from benchmarks.lib.quantized import int8
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import Policy, ragged
from benchmarks.suites import speed_table
from benchmarks.suites.speed_table import BLOCK, SELECTION, summary

REUSE = ("none", "fast_dllm/dual", "dllm_cache", "dyllm")
ON_GPU = ("fast_dllm/dual", "none", "dllm_cache", "dyllm", "fast_dllm/prefix", "fast_dllm/dual+wavefilter/serve")
#: (prompt tokens, requests)
CPU_CELLS = {
    "1,024 tokens": (1, [(1024, 1), (1024, 8)]),
    "4,096 tokens x 8": (5, [(4096, 8)]),
    "rest": (6, [(4096, 1), (256, 1), (256, 8)]),
}
PROMPTS, REQUESTS = (1024, 256, 4096), (1, 32, 8, 64)
TITLES = {
    "speed-reuse": "Speed of reuse policies",
    "speed-selection": "Speed of selections over Fast-dLLM",
    "speed-none": "Speed of the exact model against the published loop",
    "speed-custom": "Speed of one-token-per-step denoising",
    "gpu-denoising": "Denoising speed",
}


@dataclass(frozen=True)
class Case:
    policy: str  # "loop": the published loop
    prompt: int  # tokens
    requests: int
    new: int = 2 * BLOCK
    steps: int | None = None  # only the first ones
    ragged: bool = False
    seconds: float = 4.0  # no further repetition after that

    def lengths(self) -> list[int]:
        return ragged(self.prompt, self.requests) if self.ragged else [self.prompt] * self.requests

    @property
    def rows(self) -> int:
        return sum(self.lengths()) + self.requests * self.new


@dataclass(frozen=True)
class EngineSpec:
    shape: str
    cases: tuple[Case, ...]  # it has room for them
    server: dict = field(default_factory=dict)
    eager: bool = False
    weights: str = "bfloat16"


def add_arguments(parser) -> None:
    parser.add_argument("--policy", action="append", help="REUSE[+SELECTION][:field=value,…]; repeatable")
    parser.add_argument("--shape", choices=SHAPES, help="instead of the default one, with --policy")
    parser.add_argument("--cells", default="480x1,480x8", metavar="PROMPTxREQUESTS,…", help="with --policy")
    parser.add_argument("--new", type=int, default=64, help=f"response tokens, a multiple of {BLOCK}, with --policy")
    parser.add_argument("--quantization", help="vLLM's name of a method")


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    shapes: dict[str, dict] = {name: {} for name in TITLES}
    for part in parts(options) if options else ():
        shapes[part.table][part.engine.shape] = SHAPES[part.engine.shape].describe()
    more = {"quantization": options.quantization} if options and options.quantization else {}
    if options and options.model:
        more["model"] = options.model.name
    made = {}
    for name, title in TITLES.items():
        plot = speed_table.plot_bounds if name.startswith("gpu-") else speed_table.plot_ratios
        about = {"shapes": shapes[name]} | speed_table.SETTINGS | more
        made[name] = Table(
            title, speed_table.COLUMNS, speed_table.NOTES, about, speed_table.finished, speed_table.bars, plot
        )
    return made


# -- what is measured --------------------------------------------------------------------------------------------------


def parts(options: argparse.Namespace) -> list[Part]:
    if options.policy or options.model:
        return custom_parts(options)
    if options.toy:
        return toy_parts("gpu-denoising" if options.device == "cuda" else "speed-reuse")
    if options.device == "cuda":
        return gpu_parts()
    shape, made = SHAPES["llada-proportions"], []
    for name, (rank, cells) in CPU_CELLS.items():
        made += engine_parts("speed-reuse", shape, name, cpu_cases(REUSE, cells, 128, 25), rank)
    long = cpu_cases(SELECTION, [(4096, 1), (16384, 1)], 64, 60)
    made += engine_parts("speed-selection", SHAPES["llada-long"], "selections", long, 4)
    for exact in (shape, SHAPES["llada-vocabulary"]):
        cases = cpu_cases(["none"], [(480, 1), (480, 8)], BLOCK, 25)
        made += [loop_part("speed-none", exact, cases[0], options.threads, 7)]
        made += engine_parts("speed-none", exact, "exact model", cases, 7)
    return made


def cpu_cases(policies, cells: list[tuple[int, int]], new: int, seconds: float) -> list[Case]:
    """All policies of a cell before the next one. All steps of `none` cost the same: few of them are timed."""
    return [
        Case(policy, prompt, requests, new, 4 if policy == "none" and new > BLOCK else None, True, seconds)
        for prompt, requests in cells
        for policy in policies
    ]


def engine_parts(table: str, shape: Shape, name: str, cases: list[Case], rank: int | None = None) -> list[Part]:
    """One for each server that the policies need"""
    servers: dict[str, list[Case]] = {}
    for case in cases:
        servers.setdefault(Policy.parse(case.policy).key, []).append(case)
    made = []
    for own in servers.values():
        cells = tuple(Cell(cell_name(shape, case), minutes_of(shape, case), case) for case in own)
        spec = EngineSpec(shape.name, tuple(cases), Policy.parse(own[0].policy).server)
        label = f"{shape.name}, {name}" + (f", {own[0].policy}" if len(servers) > 1 else "")
        made.append(Part("speed", table, label, cells, 0.5, spec, rank))
    return made


def cell_name(shape: Shape, case: Case) -> str:
    return f"{shape.name} {case.policy} {case.prompt} x{case.requests}"


def minutes_of(shape: Shape, case: Case) -> float:
    """On two cores at 0.35 TFLOP/s"""
    steps = case.steps or case.new
    forwards = steps if case.policy == "none" else steps / 16  # a refresh per block, and partial steps
    seconds = forwards * shape.dense_flops(case.prompt + case.new) * case.requests / 3.5e11
    return 0.1 + seconds * (1 + max(1, min(3, case.seconds / seconds))) / 60


def loop_part(table: str, shape: Shape, case: Case, threads: int, rank: int) -> Part:
    own = Case("loop", case.prompt, 1, case.new, case.steps, False, case.seconds)
    cells = (Cell(cell_name(shape, own), minutes_of(shape, own) * 4, own),)
    environment, spec = tuple(loop_environment(threads).items()), EngineSpec(shape.name, (own,))
    return Part("speed", table, f"{shape.name}, loop", cells, 0.2, spec, rank, False, environment)


def gpu_parts() -> list[Part]:
    llada, dream = ([*gpu_cells(SHAPES[name])] for name in ("llada-8b", "dream-7b"))
    between = [Case("fast_dllm/dual", 1024, count) for count in (20, 40)]  # between sizes of captured steps
    blocks = [Case("none", 1024, count) for count in (8, 1)]
    eager = [
        Cell(f"{cell.name} eager", cell.minutes, cell.work)
        for cell in llada
        if (cell.work.prompt, cell.work.policy) == (1024, "fast_dllm/dual") and cell.work.requests in (1, 32)
    ]
    return [
        gpu_part("llada-8b", "first", first(llada), 3),
        gpu_part("sdar-8b", "blocks of 4", [gpu_cell(SHAPES["sdar-8b"], case) for case in blocks], 8),
        gpu_part("llada-8b", "graph sizes", [gpu_cell(SHAPES["llada-8b"], case) for case in between], 8),
        gpu_part("llada-8b", "eager", eager, 10, eager=True),
        gpu_part("dream-7b", "first", first(dream), 12),
        gpu_part("llada-8b", "rest", rest(llada), 14),
        gpu_part("dream-7b", "rest", rest(dream), 18),
    ]


def gpu_cells(shape: Shape) -> Iterator[Cell]:
    for prompt in PROMPTS:
        for requests in REQUESTS:
            for policy in ON_GPU:
                yield gpu_cell(shape, Case(policy, prompt, requests, steps=6 if policy == "none" else None))


def gpu_cell(shape: Shape, case: Case) -> Cell:
    return Cell(cell_name(shape, case), 0.05 + case.rows / 3e5, case)


def first(cells: list[Cell]) -> list[Cell]:
    """One request and 32 at one prompt, in the order of the policies"""
    own = [cell for cell in cells if cell.work.prompt == PROMPTS[0] and cell.work.requests in REQUESTS[:2]]
    return sorted(own, key=lambda cell: ON_GPU.index(cell.work.policy))


def rest(cells: list[Cell]) -> list[Cell]:
    known = {cell.name for cell in first(cells)}
    return [cell for cell in cells if cell.name not in known]


def gpu_part(shape: str, name: str, cells: list[Cell], rank: int, eager: bool = False) -> Part:
    spec = EngineSpec(shape, tuple(cell.work for cell in cells), eager=eager)
    return Part("speed", "gpu-denoising", f"{shape}, {name}", tuple(cells), 1.0, spec, rank)


def custom_parts(options: argparse.Namespace) -> list[Part]:
    on_gpu = options.device == "cuda"
    shape = SHAPES[options.shape or ("llada-8b" if on_gpu else "llada-proportions")]
    if options.new % BLOCK:
        raise SystemExit(f"--new: {options.new} is not a multiple of the canvas block, {BLOCK}")
    cells = [tuple(map(int, cell.split("x"))) for cell in options.cells.split(",")]
    cases = cpu_cases(options.policy or ["none", "fast_dllm/dual"], cells, options.new, 40)
    return engine_parts("gpu-denoising" if on_gpu else "speed-custom", shape, "custom", cases)


def toy_parts(table: str) -> list[Part]:
    toy, dream = SHAPES["toy-llada"], SHAPES["toy-dream"]
    cases = [Case("fast_dllm/dual", 48, 1, 32, seconds=0)]
    cases += [Case(policy, 48, count, 32, 4, seconds=0) for policy in ("none", "dyllm") for count in (1, 2)]
    loop = loop_part(table, toy, Case("none", 48, 1, 32, 4, seconds=0), 1, 3)
    made = [loop, *engine_parts(table, toy, "toy", cases, 3)]
    return made + engine_parts(table, dream, "toy", [Case("fast_dllm/dual", 48, 2, 32, 4, seconds=0)], 3)


# -- how it is measured ------------------------------------------------------------------------------------------------


def opened(part: Part, options: argparse.Namespace):
    spec: EngineSpec = part.engine
    if spec.cases[0].policy == "loop":
        return opened_loop(SHAPES[spec.shape])
    from benchmarks.lib import engines

    shape, length = SHAPES[spec.shape], max(max(case.lengths()) + case.new for case in spec.cases)
    folder = options.model or folder_of(shape, length, spec.weights)
    requests, rows = max(case.requests for case in spec.cases), max(case.rows for case in spec.cases)
    llm = engines.start(
        folder,
        # keys and values of every row, as much again for what policies keep of it, and slack per request
        cpu_bytes=shape.kv_bytes(2 * rows + 512 * (2 + requests)),
        load_format="auto" if [*folder.glob("*.safetensors")] else "dummy",
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=requests,
        max_num_batched_tokens=max(length, min(rows, 36864)),
        enforce_eager=spec.eager,
        quantization=options.quantization,
        additional_config={"dlm": spec.server},
    )
    if options.model:
        shape = shape_of_checkpoint(options.model)
    engine = engines.DenoisingEngine(llm)

    def measure(case: Case) -> dict:
        prompts = engines.random_prompts(shape.model.vocabulary, case.lengths(), case.prompt)
        request = shape.one_token_per_step(case.new) | Policy.parse(case.policy).request
        work = engines.Work(prompts, case.new, request, case.steps)
        runs = engine.repeated(work, 3, case.seconds)
        row = {"shape": shape.name, "method": case.policy + (", eager" if spec.eager else "")}
        row |= {"prompt": case.prompt, "new": case.new, "requests": case.requests}
        row |= summary(runs, shape, options.peaks, case.rows / case.requests)
        return row | (engine.profiled(work) if torch.cuda.is_available() else {})

    return measure


def folder_of(shape: Shape, length: int, weights: str) -> Path:
    """With the weights that the loop reads, if the shape is small; else with a config.json alone"""
    if shape.family == "llada" and shape.parameters < 1e9:
        return int8(shape.checkpoint()) if weights == "int8" else shape.checkpoint()
    return shape.folder(Path(tempfile.mkdtemp()), max(length, 512))


def opened_loop(shape: Shape):
    from benchmarks.lib import loops
    from benchmarks.lib.engines import random_prompts

    loop = loops.load(shape.checkpoint(), torch.bfloat16)

    def measure(case: Case) -> dict:
        (prompt,) = random_prompts(shape.model.vocabulary, case.lengths(), case.prompt)
        steps, seconds, what = case.steps or case.new, [], (loop, prompt, case.new, BLOCK, BLOCK)
        loops.seconds_of(*what, 2)  # warms allocators and oneDNN's primitive cache
        while not seconds or (len(seconds) < 3 and sum(seconds) < case.seconds):
            seconds.append(loops.seconds_of(*what, steps))
        middle = statistics.median(seconds)
        row = {"shape": shape.name, "method": "loop", "prompt": case.prompt, "new": case.new, "requests": 1}
        row |= {"seconds": seconds, "steps": steps, "tokens_per_s": steps / middle, "ms_per_step": 1e3 * middle / steps}
        return row | {"flops": shape.dense_flops(case.rows, steps)}

    return measure
