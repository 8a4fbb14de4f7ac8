"""Tokens per second where several tokens are filled in a step, canvases are long, or steps are guessed.

Texts are those of the demo checkpoint, since random weights are never sure of a token. On a GPU it computes inside of
LLaDA-8B's shape: its texts at the large model's cost (benchmarks/lib/enlarged.py).
"""

import argparse
import statistics
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib import plots
from benchmarks.lib.models import DEMO, SHAPES
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import recall_questions, requests_text

PROMPT, NEW, BLOCK, THRESHOLD = 1024, 512, 32, 0.9
COLUMNS = columns(
    """
    method | method
    requests | requests
    tokens_per_s | tokens/s | {:,.1f}
    against | compared with
    ratio | times as fast | {:.2f}
    forwards | forwards per request | {:.0f}
    rows | rows recomputed per request | {:,.0f}
    equal | same texts
    ms_per_forward | ms/forward | {:.1f}
    others | cores of others | {:.2f}
    failed | failed
    """
)
NOTES = [
    "tokens/s: response tokens delivered over the wall time from submission to the last of them, medians of the "
    "repetitions after a warm-up. Greedy; every canvas is filled to its end (`ignore_eos`), so all methods deliver the "
    "same number. Prompts are retrieval tasks.",
    f"threshold: all positions that are at least {THRESHOLD} sure, as in Fast-dLLM. window: number of masks after the "
    "canvas block that have rows, in addition to the last one. drafts: canvases per step that freedave verifies.",
    "On a CPU rows cost: drafts recompute as many rows in a third of the forwards, and refreshes of a prompt twice as "
    "long as the canvas take most of the time, which a window hardly shortens.",
    "Forwards and texts are the demo model's: what a decoding saves with a trained model of the large shape is another "
    "matter, what its forwards cost is not. In bfloat16 steps with other rows round differently, so texts may diverge.",
]
SETTINGS = {
    "decoding": f"prompts of {PROMPT} tokens, {NEW} new ones, canvas blocks of {BLOCK}",
    "baseline": "fast_dllm on a full canvas: one token per step, or with the threshold",
    "counted": "response tokens delivered",
}


@dataclass(frozen=True)
class EngineSpec:
    shape: str | None  # None: the demo checkpoint itself
    requests: int
    prompt: int = PROMPT
    new: int = NEW


@dataclass(frozen=True)
class Method:
    label: str
    options: dict
    against: str | None = None  # label of the method it is compared with


@dataclass(frozen=True)
class Case:
    method: Method
    requests: int
    repetitions: int


def methods(requests: int) -> list[Method]:
    """Several requests leave no rows to drafts, and one token per step takes minutes with them."""
    dual, single = {"dlm_reuse": "fast_dllm/dual"}, "one token a step"
    found = [Method(single, dual)]
    for n in (4, 8):
        found.append(Method(f"freedave, {n} drafts", {"dlm_decoding": "freedave", "dlm_drafts": n} | dual, single))
    for cache in ("dual", "prefix"):
        base, full = {"dlm_reuse": f"fast_dllm/{cache}", "dlm_threshold": THRESHOLD}, f"threshold, {cache}"
        found.append(Method(full, base))
        found += [Method(f"{full}, window {n}", base | {"dlm_window": n}, full) for n in (96, 32)]
    # open blocks are parts of one canvas block, which is the response
    several = {"dlm_decoding": "multi_block", "dlm_block_length": "none", "dlm_end_stop": False}
    for name, reuse in (("every row", "none"), ("delayed", "delayed")):
        found.append(Method(f"several open blocks, {name}", several | {"dlm_reuse": reuse}, "threshold, dual"))
    return [method for method in found if requests == 1 or "threshold" in method.label]


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    title = "Speed of decodings and extents on long canvases"
    demo = {"shapes": f"demo checkpoint, {SETTINGS['decoding']}", "dtype": "float32"} | SETTINGS
    shape = "toy-demo" if options and options.toy else "llada-8b"
    large = {"shapes": {shape: SHAPES[shape].describe()}, "dtype": "bfloat16"} | SETTINGS
    large["weights"] = "the demo checkpoint inside of the large model (benchmarks/lib/enlarged.py)"
    return {
        "gpu-rules": Table(title, COLUMNS, NOTES, large, finished, bars, plot),
        "speed-rules": Table(title, COLUMNS, NOTES[:3], demo, finished, bars, plot),
    }


def parts(options: argparse.Namespace) -> list[Part]:
    on_gpu = options.device == "cuda"
    if options.toy:
        cells = [Cell(f"{m.label} x1", 0.1, Case(m, 1, 1)) for m in methods(1) if "prefix" not in m.label]
        cells = [cell for cell in cells if "8" not in cell.name]
        spec, rank = EngineSpec("toy-demo", 1, 192, 32), 8 if on_gpu else None
        return [Part("rules", "gpu-rules", "the demo in toy-demo", tuple(cells), 0.2, spec, rank)]
    cells = tuple(
        Cell(f"{method.label} x{count}", 0.1 if on_gpu else 1.0, Case(method, count, 3 if on_gpu or count == 1 else 1))
        for count in (1, 8)
        for method in methods(count)
    )
    if on_gpu:
        return [Part("rules", "gpu-rules", "the demo in llada-8b", cells, 1.0, EngineSpec("llada-8b", 8), 8)]
    return [Part("rules", "speed-rules", "the demo", cells, 0.2, EngineSpec(None, 8))]


def opened(part: Part, options: argparse.Namespace):
    from benchmarks.lib import engines, enlarged, internals

    spec: EngineSpec = part.engine
    length, more = spec.prompt + spec.new, {"dtype": "float32", "enforce_eager": True}
    folder = DEMO
    if spec.shape:
        enlarged.register(DEMO, SHAPES[spec.shape])
        folder = enlarged.folder_for(DEMO, SHAPES[spec.shape], Path(tempfile.mkdtemp()), length)
        more = {"dtype": "bfloat16", "load_format": enlarged.LOAD_FORMAT}
    sizes = {"max_model_len": length, "max_num_seqs": spec.requests, "max_num_batched_tokens": spec.requests * length}
    llm = engines.start(folder, cpu_bytes=1 << 29, **sizes, **more)
    prompts = [sample.prompt_ids for sample in recall_questions(spec.requests, spec.prompt, seed=5)]

    def measure(case: Case) -> dict:
        sums = internals.StepSums(internals.layers_of(llm))
        params = engines.sampling(spec.new, {"dlm_block_length": BLOCK} | case.method.options, ignore_eos=True)
        own, seconds, texts = prompts[: case.requests], [], []
        engines.generate(llm, own, params)
        with internals.observing(llm, sums):
            for _ in range(case.repetitions):
                begin = time.perf_counter()
                texts = engines.generate(llm, own, params)
                seconds.append(time.perf_counter() - begin)
        each, middle = case.requests * case.repetitions, statistics.median(seconds)
        row = {
            "shape": spec.shape or "demo",
            "method": case.method.label,
            "requests": case.requests,
            "seconds": seconds,
        }
        row |= {"tokens_per_s": case.requests * spec.new / middle, "against": case.method.against}
        row |= {"forwards": sums.forwards / each, "rows": sums.rows / each}
        row["texts"] = [zlib.crc32(str(text).encode()) for text in texts]  # to be compared, in few bytes
        # The requests begin and, nearly, end together: a forward of all of them is one of each.
        return row | {"ms_per_forward": 1e3 * middle / row["forwards"]}

    return measure


def finished(rows: list[dict]) -> list[dict]:
    """With the ratio to the method that each is compared with; drafts must give its texts."""
    known = {(row["method"], row["requests"]): row for row in rows if "tokens_per_s" in row}
    for (method, requests), row in known.items():
        if base := known.get((row["against"], requests)):
            row["ratio"] = row["tokens_per_s"] / base["tokens_per_s"]
            if method.startswith("freedave") and "texts" in row:
                same = sum(one == other for one, other in zip(row["texts"], base["texts"], strict=True))
                row["equal"] = f"{same} of {requests}"
    return rows


def bars(rows: list[dict]) -> list[str]:
    found = []
    drafts = [row for row in rows if row.get("method", "").startswith("freedave") and row["requests"] == 1]
    if ratios := [row["ratio"] for row in drafts if "ratio" in row]:
        found.append(f"Bar: drafts at least 1.8 times one token a step, one request: {max(ratios):.2f} times.")
    if windows := [row["ratio"] for row in rows if "window" in row.get("method", "") and "ratio" in row]:
        found.append(
            f"Bar: the window upon fast_dllm with a threshold at least twice as fast: {max(windows):.2f} times at most."
        )
    return found


def plot(figure, rows: list[dict]) -> None:
    """Methods on the y axis, a panel per number of requests"""
    rows = [row for row in rows if "tokens_per_s" in row]
    counts, names = sorted({row["requests"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    if not counts:
        return
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        own = {row["method"]: row["tokens_per_s"] for row in rows if row["requests"] == count}
        title = f"tokens per second, {requests_text(count)}"
        plots.dots(axes, names, [own.get(name) for name in names], title, "{:.0f}")
        axes.set_xlim(0, 1.15 * max(own.values()))
