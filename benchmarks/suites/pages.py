"""Milliseconds of a decoding step at long context: vLLM's own attention, and the same with pages chosen by UNIQUE.

Random decoders, bfloat16, greedy. On a CPU the cache holds random keys and values in place of a prompt's, which no
step's time depends on. `python -m benchmarks correctness` shows that a budget of all pages gives vLLM's own text.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.lib import plots
from benchmarks.lib.bounds import Reading, decoding_bound
from benchmarks.lib.models import SHAPES, Shape, shape_of_checkpoint
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import requests_text

COLUMNS = columns(
    """
    shape | model
    method | method
    context | context | {:,}
    asked | requests
    requests | that fit
    ms_per_step | ms/step | {:.2f}
    tokens_per_s | tokens/s | {:,.2f}
    speedup | × dense | {:.2f}
    bound_ms | bound ms | {:.2f}
    of_bound | of the bound | {:.0%}
    bound_speedup | bound: × dense | {:.1f}
    pages_share | pages read, choosing layers | {:.1%}
    kv_share | keys read, all layers | {:.1%}
    launches | launches | {:.0f}
    graph_launches | graphs | {:.1f}
    copies | copies | {:.0f}
    waits | waits | {:.1f}
    others | cores of others | {:.2f}
    failed | failed
    """
)
NOTES = [
    "ms/step: wall time of a decoding step of all requests, from the step in which the last of them has its first "
    "token to the last token, over the steps between. Prompts do not count. The median of the repetitions.",
    "dense: vLLM with its own attention, without a dlm option. Both methods run in engines of their own, one after the "
    "other on the same device.",
    "On a CPU requests share one prompt (prefix cache) and its physical pages, which hold random keys and values; "
    "either method reads them once per request. On a GPU prompts differ and go through the model once.",
    "that fit: requests whose keys and values fit next to the weights, if that is fewer than requested.",
    "keys read, all layers: including the layers that read everything, by default the first two (dense_layers). bound: "
    "weights, keys and values read and summaries of pages, at the device's bandwidth.",
    "100% of the pages read: contexts too short to choose, whose pages go through the same graph as longer ones.",
]
SETTINGS = {
    "dtype": "bfloat16",
    "weights": "random (vLLM's load_format=dummy)",
    "baseline": "vLLM's own attention (dense), the same engine without a dlm option",
    "counted": "wall time of a decoding step of all requests, medians of repetitions; prompts do not count",
}
#: (tokens of context, requests); pages are chosen from 8,192 tokens on
LONG = [(131072, 1), (32768, 8), (131072, 8), (32768, 1), (8192, 1), (8192, 8), (65536, 1), (65536, 8)]
LONG += [(16384, 1), (16384, 8)]
COMPILING = {"default": "vLLM's default", "graphs": "graphs", "eager": "eager"}
STARTING = {"default": 2.5, "graphs": 1.2, "eager": 1.0}  # minutes


@dataclass(frozen=True)
class EngineSpec:
    shape: str
    selection: dict | None
    requests: int
    length: int
    compiling: str
    shared: bool = False  # one prompt for all requests, with random keys and values


@dataclass(frozen=True)
class Case:
    context: int
    requests: int
    new: int = 33
    repetitions: int = 3


def add_arguments(parser) -> None:
    parser.add_argument("--compiling", choices=COMPILING, help="default: eager on a CPU, else vLLM's default")
    parser.add_argument("--context", type=int, help="tokens of context instead of the default ones")
    parser.add_argument("--budget", type=int, help="budget_tokens (default UNIQUE's)")
    parser.add_argument("--page-size", type=int, help="default UNIQUE's")


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    settings = dict(SETTINGS)
    if options:
        shapes = {part.engine.shape for part in parts(options)}
        settings |= {"shapes": {name: SHAPES[name].describe() for name in sorted(shapes)}}
        settings |= {"selection": selection_fields(selection_of(options)), "engine": COMPILING[compiling_of(options)]}
        if options.model:
            settings["model"] = options.model.name
    made = Table("Page-sparse decoding", COLUMNS, NOTES, settings, finished, bars, plot_shapes)
    title = "Decoding at long context: pages chosen by UNIQUE against dense vLLM"
    return {"gpu-pages": made, "decode": Table(title, COLUMNS, NOTES, settings, finished, bars, plot_requests)}


def compiling_of(options: argparse.Namespace) -> str:
    return options.compiling or ("eager" if options.device == "cpu" or options.toy else "default")


def selection_of(options: argparse.Namespace) -> dict:
    toy = {"page_size": 32, "budget_tokens": 256, "min_context": 0} if options.toy else {}
    given = {"budget_tokens": options.budget, "page_size": options.page_size}
    return {"name": "unique"} | toy | {name: value for name, value in given.items() if value}


def selection_fields(selection: dict) -> dict:
    from vllm_dlm.options import server_options

    made = server_options({"selection": selection}, "low_confidence").selection
    return {"name": made.name} | asdict(made)


def parts(options: argparse.Namespace) -> list[Part]:
    table, unique = "gpu-pages" if options.device == "cuda" else "decode", selection_of(options)
    methods = {"unique": unique, "dense": None}
    if options.toy:
        made = {"toy-llama": ("toy", [(1024, 1), (2048, 2)], 11)}
    elif options.device == "cuda" and not options.context:
        llama = {"first": ("llama-3-8b", LONG[:2], 11), "rest": ("llama-3-8b", LONG[2:], 15)}
        qwen = {"first": ("qwen2.5-7b", LONG[:2], 13), "rest": ("qwen2.5-7b", LONG[2:], 16)}
        return [
            part
            for own in (llama, qwen)
            for name, (shape, places, rank) in own.items()
            for part in parts_of(options, table, shape, name, places, rank, methods)
        ]
    else:
        methods = {"dense": None, "unique": unique, "unique, dense_layers []": unique | {"dense_layers": []}}
        shape, count = ("llama-3-8b", 8) if options.device == "cuda" else ("qwen1.5-0.5b", 4)
        made = {shape: ("long", [(options.context or 32768, 1), (options.context or 32768, count)], 3)}
    return [
        part
        for shape, (name, places, rank) in made.items()
        for part in parts_of(options, table, shape, name, places, rank, methods)
    ]


def parts_of(options, table: str, shape: str, name: str, places, rank: int, methods: dict) -> Iterator[Part]:
    """One method after the other: switching between them takes an engine each."""
    on_cpu, compiling = options.device == "cpu", compiling_of(options)
    more = {"new": 12, "repetitions": 1} if options.toy else {"new": 17, "repetitions": 5} if on_cpu else {}
    for method, selection in methods.items():
        cells = tuple(
            Cell(f"{shape} {method} {context} x{count}", 0.05 + context * count / 4e5, Case(context, count, **more))
            for context, count in places
        )
        longest, requests = max(context for context, _ in places) + 128, max(count for _, count in places)
        spec = EngineSpec(shape, selection, requests, longest, compiling, on_cpu and not options.model)
        yield Part("pages", table, f"{shape} {method}, {name}", cells, STARTING[compiling], spec, rank)


def opened(part: Part, options: argparse.Namespace):
    import torch

    from benchmarks.lib import engines, internals
    from benchmarks.lib.device import Profile

    spec: EngineSpec = part.engine
    shape, more = SHAPES[spec.shape], {}
    if spec.selection:
        more["additional_config"] = {"dlm": {"selection": spec.selection}}
    if spec.compiling == "graphs":
        more["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    longest = max(case.work.context + 2 * case.work.new + 512 for case in part.cells)
    llm = engines.start(
        options.model or shape.folder(Path(tempfile.mkdtemp()), spec.length),
        cpu_bytes=int(1.06 * shape.kv_bytes((1 if spec.shared else spec.requests) * longest + 256 * spec.requests)),
        load_format="auto" if options.model else "dummy",
        dtype="bfloat16",
        max_model_len=spec.length,
        max_num_seqs=spec.requests,
        max_num_batched_tokens=min(4096 if spec.shared else 8192, spec.length),
        enforce_eager=spec.compiling == "eager",
        **more,
    )
    shape = shape_of_checkpoint(options.model) if options.model else shape
    reading = reading_of(shape, spec.selection) if spec.selection else None
    if spec.shared:
        internals.skip_prompts(llm)
    method = part.name.removeprefix(f"{spec.shape} ").rpartition(", ")[0]

    def measure(case: Case) -> dict:
        requests = min(case.requests, room(llm, case.context + 2 * case.new)) if not spec.shared else case.requests
        if not requests:
            raise MemoryError("the keys and values of one request do not fit next to the weights")
        prompts = prompts_of(shape, case.context, requests, spec.shared)
        engines.decode(llm, prompts[:1] if spec.shared else prompts, 2)  # later runs find it in the prefix cache
        if spec.shared:
            internals.fill_cache(llm)
        engines.decode(llm, prompts, 4)
        before = internals.page_counts(llm) if reading else {}
        seconds = [engines.decode(llm, prompts, case.new)[0] for _ in range(case.repetitions)]
        after = internals.page_counts(llm) if reading else {}
        counts = {name: after[name] - value for name, value in before.items()}
        profile = Profile(4, 8)
        if torch.cuda.is_available():
            engines.decode(llm, prompts, 16, profile)
        row = {"shape": shape.name, "method": method, "context": case.context, "asked": case.requests}
        row |= {"requests": requests, "seconds_per_step": seconds}
        return row | timing(shape, case.context, requests, seconds, reading, counts, options.peaks) | profile.found()

    return measure


def timing(shape: Shape, context: int, requests: int, seconds: list[float], reading, counts: dict, peaks) -> dict:
    middle = statistics.median(seconds)
    chosen = reading if counts.get("sparse_rows") else None  # None: the context is too short to choose
    least = decoding_bound(shape, context, requests, chosen, peaks)
    row = {"ms_per_step": 1000 * middle, "tokens_per_s": requests / middle, "bound_ms": least.ms, "bound_by": least.by}
    row["of_bound"] = least.ms / (1000 * middle)
    if counts.get("pages_seen"):
        share = counts["pages_read"] / counts["pages_seen"]
        choosing = reading.choosing / shape.model.layers
        row |= counts | {"pages_share": share, "kv_share": choosing * share + 1 - choosing}
    return row


def reading_of(shape: Shape, selection: dict) -> Reading:
    fields = selection_fields(selection)
    return Reading(fields["budget_tokens"], fields["page_size"], shape.model.layers - len(fields["dense_layers"]))


def room(llm, length: int) -> int:
    """Requests of that length for whose keys and values there is memory"""
    cache = llm.llm_engine.vllm_config.cache_config
    return (cache.num_gpu_blocks - 1) // -(-length // cache.block_size)


def prompts_of(shape: Shape, context: int, requests: int, shared: bool) -> list[list[int]]:
    """One token more than whole blocks: a repetition computes that token alone."""
    from benchmarks.lib.engines import random_prompts

    length = context // 128 * 128 - 127
    own = random_prompts(shape.model.vocabulary, [length] * (1 if shared else requests), context)
    return own * requests if shared else own


def finished(rows: list[dict]) -> list[dict]:
    names, order = ("shape", "context", "asked"), list(SHAPES)
    dense = {tuple(row[name] for name in names): row for row in rows if row.get("method") == "dense"}
    for row in rows:
        base = dense.get(tuple(row.get(name) for name in names))
        if base and "ms_per_step" in row and base["requests"] == row["requests"]:
            row["speedup"] = base["ms_per_step"] / row["ms_per_step"]
            if "bound_ms" in row:
                row["bound_speedup"] = base["bound_ms"] / row["bound_ms"]

    def place(row: dict) -> tuple:
        if "ms_per_step" not in row:
            return (len(order) + 1,)
        shape = order.index(row["shape"]) if row["shape"] in order else len(order)
        return shape, row["shape"], row["context"], row["asked"], row["method"]

    return sorted(rows, key=place)


def bars(rows: list[dict]) -> list[str]:
    found, sparse = [], [row for row in rows if row.get("method") == "unique" and "speedup" in row]
    far = [f"{row['speedup']:.1f} ({row['shape']}, {row['requests']})" for row in sparse if row["context"] >= 131000]
    if far:
        found.append(f"Bar: at 128k at least 5 times vLLM dense (shape, requests): {', '.join(far)}.")
    if reading := [row for row in sparse if row.get("pages_share", 1) < 1]:
        least = min(reading, key=lambda row: row["speedup"])
        found.append(
            f"Bar: not slower than dense wherever pages are chosen: at least {least['speedup']:.2f} times as fast "
            f"({least['shape']}, {least['context']:,} tokens, {least['requests']} requests)."
        )
    return found


def plot_requests(figure, rows: list[dict]) -> None:
    groups: dict[str, dict[str, float]] = {}
    for row in (row for row in rows if "ms_per_step" in row):
        groups.setdefault(f"{row['shape']}\n{requests_text(row['requests'])}", {})[row["method"]] = row["ms_per_step"]
    if groups:
        plots.bars(figure.subplots(), groups, "ms per decoding step of all requests")


def plot_shapes(figure, rows: list[dict]) -> None:
    measured = [row for row in rows if "ms_per_step" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in measured))
    for index, shape in enumerate(shapes):
        axes, groups = figure.add_subplot(len(shapes), 1, index + 1), {}
        for row in (row for row in measured if row["shape"] == shape):
            short = f"{row['context'] // 1024}k" if row["context"] >= 1024 else str(row["context"])
            groups.setdefault(f"{short} × {row['requests']}", {})[row["method"]] = row["ms_per_step"]
        plots.bars(axes, groups, f"{shape}\nms per step")
        axes.set_xlabel("tokens of context × requests", fontsize=8)
