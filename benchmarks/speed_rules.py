"""Tokens per second where several tokens are filled in a step, canvases are long, or steps are guessed, on the demo
checkpoint: it writes text, and random weights are never sure of a token.
"""

import statistics
import time
from dataclasses import dataclass

from benchmarks import drawing, report

PROMPT, NEW, BLOCK, THRESHOLD = 1024, 512, 32, 0.9

TITLE = "Speed of decodings and extents on long canvases"
COLUMNS = [
    report.Column("method", "method"),
    report.Column("requests", "requests"),
    report.Column("tokens_per_s", "tokens/s", "{:,.1f}"),
    report.Column("against", "beside"),
    report.Column("ratio", "times as fast", "{:.2f}"),
    report.Column("forwards", "forwards per request", "{:.0f}"),
    report.Column("rows", "rows recomputed per request", "{:,.0f}"),
    report.Column("equal", "same texts"),
    report.Column("others", "cores of others", "{:.2f}"),
]
NOTES = [
    "tokens/s: response tokens delivered over the wall time from submission to the last of them, medians of three "
    "repetitions (of several requests one) after one that warms up. Greedy; every canvas is filled to its end "
    "(`ignore_eos`), so that all methods deliver as much, and the prompts are those of retrieval tasks.",
    "threshold: all positions at least .9 sure, as Fast-dLLM has it. window: of the masks behind the canvas block so "
    "many and the last one have rows. drafts: canvases of a step that freedave looks at.",
    "What a CPU pays for is rows: drafts recompute as many in a third of the forwards, and beside a prompt of twice "
    "the canvas refreshes, which a window hardly makes shorter, are most of them.",
]


@dataclass(frozen=True)
class Method:
    label: str
    options: dict
    against: str | None = None  # the label of the method it is compared with


def methods(requests: int) -> list[Method]:
    """Several requests leave no rows to drafts, and one token a step takes them minutes."""
    return [method for method in _methods() if requests == 1 or "threshold" in method.label]


def _methods() -> list[Method]:
    found = [Method("one token a step", {"dlm_reuse": "fast_dllm/dual"})]
    found += [
        Method(
            f"freedave, {n} drafts", {"dlm_algorithm": "freedave", "dlm_drafts": n, "dlm_reuse": "fast_dllm/dual"},
            "one token a step",
        )
        for n in (4, 8)
    ]  # fmt: skip
    for cache in ("dual", "prefix"):
        base = {"dlm_reuse": f"fast_dllm/{cache}", "dlm_threshold": THRESHOLD}
        full = f"threshold, {cache}"
        found.append(Method(full, base))
        found += [Method(f"{full}, window {n}", base | {"dlm_window": n}, full) for n in (96, 32)]
    return found


def measure(engine, method: Method, requests: int, samples, repetitions: int = 3, new: int = NEW) -> dict:
    from vllm import SamplingParams

    from benchmarks.quality_rules import Sums

    denoiser = engine.runner.denoiser
    sums = Sums(len(denoiser.model.model.layers))
    params = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False,
        extra_args={"dlm_block_length": BLOCK} | method.options,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": sample.prompt_ids} for sample in samples[:requests]]
    seconds, texts = [], []
    for repetition in range(repetitions + 1):
        if repetition == 1:
            denoiser.observers.append(sums)
        begin = time.perf_counter()
        outputs = engine.llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
    denoiser.observers.remove(sums)
    each = requests * repetitions
    return {
        "method": method.label, "requests": requests, "seconds": seconds[1:],
        "tokens_per_s": requests * new / statistics.median(seconds[1:]), "against": method.against,
        "forwards": sums.forwards / each, "rows": sums.rows / each, "texts": texts,
    }  # fmt: skip


def finished(rows: list[dict]) -> list[dict]:
    """Beside the method each is compared with; drafts must give its texts."""
    known = {(row["method"], row["requests"]): row for row in rows}
    for row in rows:
        if base := known.get((row["against"], row["requests"])):
            row["ratio"] = row["tokens_per_s"] / base["tokens_per_s"]
            if row["method"].startswith("freedave"):
                same = sum(one == other for one, other in zip(row["texts"], base["texts"], strict=True))
                row["equal"] = f"{same} of {row['requests']}"
    return [{key: value for key, value in row.items() if key != "texts"} for row in rows]


def samples(count: int, prompt: int = PROMPT):
    import numpy as np

    from examples.demo import tasks

    rng, filler = np.random.default_rng(5), tasks.Filler(7)
    return [tasks.recall(rng, filler, prompt, needles=8, queried=2) for _ in range(count)]


def settings() -> dict:
    return {
        "shapes": f"demo checkpoint, prompts of {PROMPT} tokens, {NEW} new ones, canvas blocks of {BLOCK}",
        "dtype": "float32",
        "baseline": "fast_dllm on a full canvas: one token a step, or with the threshold",
        "counted": "response tokens delivered",
    }


def plot(figure, rows: list[dict]) -> None:
    """Methods down the side, a panel per number of requests."""
    counts = sorted({row["requests"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, counts, strict=True):
        own = {row["method"]: row["tokens_per_s"] for row in rows if row["requests"] == count}
        title = f"tokens per second, {count} request{'s' * (count > 1)}"
        drawing.dots(axes, names, [own.get(name) for name in names], title, "{:.0f}")
        axes.set_xlim(0, 1.15 * max(own.values()))
