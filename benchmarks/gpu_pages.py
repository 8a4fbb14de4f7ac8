"""The table of page-sparse decoding on a GPU: a decoding step at long context, pages chosen by UNIQUE against vLLM's
own attention over everything."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import drawing, report
from benchmarks.gpu_device import Profile
from benchmarks.gpu_engine import memory
from benchmarks.gpu_parts import Cell, Part
from benchmarks.gpu_shapes import SHAPES, Peaks, Reading, decoding_bound, in_order, panels

TITLE = "Page-sparse decoding"
COLUMNS = [
    report.Column("shape", "shape"),
    report.Column("method", "method"),
    report.Column("context", "context", "{:,}"),
    report.Column("asked", "requests"),
    report.Column("requests", "that fit"),
    report.Column("ms_per_step", "ms/step", "{:.2f}"),
    report.Column("tokens_per_s", "tokens/s", "{:,.1f}"),
    report.Column("speedup", "× dense", "{:.2f}"),
    report.Column("bound_ms", "bound ms", "{:.2f}"),
    report.Column("of_bound", "of the bound", "{:.0%}"),
    report.Column("bound_speedup", "bound: × dense", "{:.1f}"),
    report.Column("pages_share", "pages read, choosing layers", "{:.1%}"),
    report.Column("launches", "launches", "{:.0f}"),
    report.Column("graph_launches", "graphs", "{:.1f}"),
    report.Column("copies", "copies", "{:.0f}"),
    report.Column("waits", "waits", "{:.1f}"),
    report.Column("failed", "failed"),
]
SETTINGS = {
    "dtype": "bfloat16",
    "weights": "random, made on the device (vLLM's load_format=dummy)",
    "baseline": "vLLM's own attention (dense), the same engine without a dlm option",
    "counted": "wall time of a decoding step of all requests, medians of repetitions; prompts do not count",
}
NOTES = [
    "Prompts are different ones and go through the model once; repetitions find all but their last token in the "
    "prefix cache. ms/step: from the step in which the last request has its first token to the last token.",
    "that fit: requests whose keys and values fit beside the weights, where that is fewer than asked for; both methods "
    "of a row pair then decode as many.",
    "bound: weights, keys and values read and summaries of pages, at the device's bandwidth.",
    "100% of the pages read: contexts too short to choose. A graph serves them as well as longer ones, so that their "
    "pages go through the same kernels.",
]


@dataclass(frozen=True)
class Engine:
    shape: str
    selection: dict | None
    requests: int
    length: int
    compiling: str = "vLLM's default"  # or "graphs": no torch.compile; or "eager"


@dataclass(frozen=True)
class Decoding:
    context: int
    requests: int
    new: int = 33
    repetitions: int = 3


def opened(part: Part, peaks: Peaks):
    engine: Engine = part.engine
    shape, llm = SHAPES[engine.shape], started(engine)
    reading = None if engine.selection is None else reading_of(shape, engine.selection)

    def measure(cell: Cell) -> dict:
        own: Decoding = cell.what
        requests = min(own.requests, room(llm, own.context + 2 * own.new))
        if not requests:
            raise MemoryError("the keys and values of one request do not fit beside the weights")
        prompts = prompts_of(shape, own.context, requests)
        decode(llm, prompts, 2)  # the prompts; later runs find them in the prefix cache
        decode(llm, prompts, 4)
        before = page_counts(llm, reading)
        seconds = [decode(llm, prompts, own.new) for _ in range(own.repetitions)]
        counted = {name: value - before[name] for name, value in page_counts(llm, reading).items()}
        middle = statistics.median(seconds)
        least = decoding_bound(shape, own.context, requests, active(reading, counted), peaks)
        profile = Profile(4, 8)
        decode(llm, prompts, 16, profile)
        row = {
            "shape": shape.name, "method": "dense" if reading is None else "unique", "context": own.context,
            "asked": own.requests, "requests": requests, "seconds_per_step": seconds, "ms_per_step": 1000 * middle,
            "tokens_per_s": requests / middle, "bound_ms": least.ms, "bound_by": least.by,
            "of_bound": least.ms / (1000 * middle),
        }  # fmt: skip
        if counted.get("pages_seen"):
            row["pages_share"] = counted["pages_read"] / counted["pages_seen"]
        return row | profile.found()

    return measure


def started(engine: Engine):
    from vllm import LLM

    settings = {"additional_config": {"dlm": {"selection": engine.selection}}} if engine.selection else {}
    if engine.compiling == "graphs":
        settings["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    folder = SHAPES[engine.shape].folder(Path(tempfile.mkdtemp()), engine.length)
    return LLM(
        str(folder), load_format="dummy", dtype="bfloat16", max_model_len=engine.length,
        max_num_seqs=engine.requests, max_num_batched_tokens=min(8192, engine.length), skip_tokenizer_init=True,
        enforce_eager=engine.compiling == "eager", disable_log_stats=True, use_tqdm_on_load=False,
        **memory(), **settings,
    )  # fmt: skip


def reading_of(shape, selection: dict) -> Reading:
    from benchmarks.decode import selection_fields

    fields = selection_fields(selection)
    return Reading(fields["budget_tokens"], fields["page_size"], shape.model.layers - len(fields["dense_layers"]))


def active(reading: Reading | None, counted: dict) -> Reading | None:
    """None where the context is too short for pages to be chosen."""
    return reading if counted.get("sparse_rows") else None


def page_counts(llm, reading: Reading | None) -> dict:
    if reading is None:
        return {}
    (counts,) = llm.collective_rpc("dlm_page_counts")
    return counts


def room(llm, length: int) -> int:
    """Requests of that length whose keys and values there is memory for."""
    cache = llm.llm_engine.vllm_config.cache_config
    return (cache.num_gpu_blocks - 1) // -(-length // cache.block_size)


def prompts_of(shape, context: int, requests: int) -> list[list[int]]:
    """One token more than whole blocks, which is what a repetition computes anew."""
    draw = torch.Generator().manual_seed(context)
    shortened = context // 128 * 128 - 127
    return torch.randint(0, shape.model.vocabulary - 2, (requests, shortened), generator=draw).tolist()


def decode(llm, prompts: list[list[int]], new: int, profile: Profile | None = None) -> float:
    """Seconds per decoding step of all requests."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    engine = llm.llm_engine
    tokens = {f"{time.monotonic_ns()}-{i}": 0 for i in range(len(prompts))}
    for name, prompt in zip(tokens, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    begin, done, step = None, 0, 0
    while engine.has_unfinished_requests():
        if profile and begin is not None:
            profile.begin_step(step)
            step += 1
        for output in engine.step():
            tokens[output.request_id] += len(output.outputs[0].token_ids)
        if begin is None and all(tokens.values()):
            begin, done = time.perf_counter(), min(tokens.values())
    return (time.perf_counter() - begin) / max(1, new - done)


def finished(rows: list[dict]) -> list[dict]:
    names = ("shape", "context", "asked")
    dense = {tuple(row[name] for name in names): row for row in rows if row.get("method") == "dense"}
    for row in rows:
        base = dense.get(tuple(row.get(name) for name in names))
        if base and "ms_per_step" in row and base["requests"] == row["requests"]:
            row["speedup"] = base["ms_per_step"] / row["ms_per_step"]
            row["bound_speedup"] = base["bound_ms"] / row["bound_ms"]
    return in_order(rows, "context", "asked", "method")


def bars(rows: list[dict]) -> list[str]:
    told = []
    sparse = [row for row in rows if row.get("method") == "unique" and "speedup" in row]
    far = [f"{row['speedup']:.1f} ({row['shape']}, {row['requests']})" for row in sparse if row["context"] >= 131000]
    if far:
        told.append(f"Bar: at 128k at least 5 times vLLM dense (shape, requests): {', '.join(far)}.")
    if reading := [row for row in sparse if row.get("pages_share", 1) < 1]:
        least = min(reading, key=lambda row: row["speedup"])
        told.append(
            f"Bar: not slower than dense wherever pages are chosen: at least {least['speedup']:.2f} times as fast "
            f"({least['shape']}, {least['context']:,} tokens, {least['requests']} requests)."
        )
    return told


def plot(figure, rows: list[dict]) -> None:
    """Milliseconds of a step; a panel per shape."""
    for axes, shape, own in panels(figure, rows):
        groups: dict[str, dict[str, float]] = {}
        for row in own:
            short = f"{row['context'] // 1024}k" if row["context"] >= 1024 else str(row["context"])
            groups.setdefault(f"{short} × {row['requests']}", {})[row["method"]] = row["ms_per_step"]
        drawing.bars(axes, groups, f"{shape}\nms per step")
        axes.set_xlabel("tokens of context × requests", fontsize=8)
