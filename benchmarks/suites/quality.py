"""What reuse costs in quality, on the demo checkpoint: exact match, and how far distributions drift from `none`.

Exact match alone cannot rank refresh policies, since a prompt cache that is never refreshed answers retrieval as well.
So every step of every policy is also compared with a full forward over the same canvas: does the position it fills get
the token of the exact model, and what is the divergence of the two distributions?
"""

import argparse
from dataclasses import dataclass

from benchmarks.lib import plots
from benchmarks.lib.models import DEMO
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import Policy

CANVAS, BLOCK = 32, 8
#: the policies at their defaults, which must keep the exact match of `none`
DEFAULTS = ["none", "fast_dllm:cache=prefix", "fast_dllm:cache=dual", "dllm_cache", "dyllm"]
#: one field varied at a time
CURVES = [
    *(f"dllm_cache:prompt_interval={n}" for n in (4, 16, 100)),
    *(f"dllm_cache:response_interval={n}" for n in (2, 4, 16, 32)),
    *(f"dllm_cache:transfer_ratio={share}" for share in (0.0, 0.1, 0.5, 1.0)),
    *(f"dyllm:threshold={tau}" for tau in (0.9, 0.98, 0.99, 0.999)),
    *(f"dyllm:whole_interval={n}" for n in (0, 4, 16)),
    *(f"dyllm:refresh_interval={n}" for n in (4, 8, 16)),
    "frozen",
    *(f"delayed:length={BLOCK},delay={n}" for n in (1, 4)),
]
COLUMNS = columns(
    """
    policy | policy
    prompts | prompts
    exact_match | exact match | {:.1%}
    vs_none | points vs none | {:+.1f}
    agreement | agreement | {:.2%}
    kl | mean KL | {:.2e}
    rows_share | rows recomputed | {:.1%}
    failed | failed
    """
)
NOTES = [
    f"Demo checkpoint, greedy, canvas of {CANVAS} tokens, blocks of {BLOCK}, one token per step, ended by the end "
    "token. Exact match: the whole answer, end token included.",
    "agreement: share of filled positions that got the token the exact model gives on the same canvas. mean KL: of the "
    "exact model's distribution from the policy's, over all masked positions of the block, in nats.",
    "rows recomputed: rows through the feed-forward, of canvas x layers x steps.",
]


@dataclass(frozen=True)
class Case:
    policy: str
    drift: int  # prompts
    prompts: int = 0  # for exact match


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    settings = {
        "shapes": f"demo checkpoint, canvas of {CANVAS}, blocks of {BLOCK}",
        "dtype": "float32",
        "baseline": "none, the exact model, on the same prompts and canvases",
        "counted": "whole answers; drift over the masked positions of every step",
        "tasks": "equal shares of recall at 256 tokens (8 needles, 2 asked for), copy, sort, addition, totals",
        "prompts": dict(zip(("exact match", "drift"), counts(options), strict=True)),
    }
    title = "Quality of feature reuse on the demo checkpoint"
    return {"quality": Table(title, COLUMNS, NOTES, settings, finished, plot=plot, timed=False)}


def counts(options: argparse.Namespace | None) -> tuple[int, int]:
    return (8, 4) if options and options.toy else (500, 100)


def parts(options: argparse.Namespace) -> list[Part]:
    many, some = counts(options)
    policies = DEFAULTS if options.toy else [*DEFAULTS, *CURVES]
    cells = [Cell(text, 0.2 if options.toy else 2.0, Case(text, some, many * (text in DEFAULTS))) for text in policies]
    return [Part("quality", "quality", "policies", tuple(cells))]


def start(max_model_len: int = 512, checkpoint=DEMO):
    from benchmarks.lib import engines

    sizes = {"max_model_len": max_model_len, "max_num_seqs": 16, "max_num_batched_tokens": max(4096, max_model_len)}
    return engines.start(checkpoint, cpu_bytes=1 << 29, dtype="float32", enforce_eager=True, **sizes)


def answers(llm, samples: list, request: dict | None = None) -> list[list[int]]:
    from benchmarks.lib import engines

    params = engines.sampling(CANVAS, {"dlm_block_length": BLOCK} | (request or {}))
    return [
        text
        for part in engines.batches(samples)
        for text in engines.generate(llm, [s.prompt_ids for s in part], params)
    ]


def exact_match(llm, samples: list, request: dict | None = None) -> float:
    found = answers(llm, samples, request)
    return sum(got == sample.answer_ids for got, sample in zip(found, samples, strict=True)) / len(samples)


def opened(part: Part, options: argparse.Namespace):
    from benchmarks.lib import internals
    from vllm_dlm.options import server_options

    llm, samples = start(), questions(max(counts(options)))

    def measure(case: Case) -> dict:
        policy = Policy.parse(case.policy)
        internals.set_server_options(llm, server_options(policy.server, "low_confidence"))
        with internals.observing(llm, internals.Drift(llm)) as sums:
            answers(llm, samples[: case.drift], policy.request)
        row = {"policy": case.policy, "agreement": sums.agreed / sums.filled, "kl": sums.kl / sums.rows}
        row["rows_share"] = sums.recomputed / sums.dense
        if case.prompts:
            right = exact_match(llm, samples[: case.prompts], policy.request)
            row |= {"prompts": case.prompts, "exact_match": right}
        return row

    return measure


def questions(count: int) -> list:
    import numpy as np

    from examples.demo import tasks

    rng, filler = np.random.default_rng(31), tasks.Filler(7)
    kinds = [
        lambda: tasks.recall(rng, filler, 256, needles=8, queried=2),
        *(lambda make=make: make(rng) for make in (tasks.copy, tasks.sort, tasks.add, tasks.totals)),
    ]
    return [kinds[index % len(kinds)]() for index in range(count)]


def finished(rows: list[dict]) -> list[dict]:
    none = [row["exact_match"] for row in rows if row.get("policy") == "none"]
    for row in rows:
        if none and "exact_match" in row:
            row["vs_none"] = 100 * (row["exact_match"] - none[0])
    return rows


def plot(figure, rows: list[dict]) -> None:
    """Drift and rows recomputed next to each other, a line per policy"""
    rows = [row for row in rows if "kl" in row]
    figure.set_size_inches(9, 7.5)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["policy"] for row in rows]
    plots.dots(left, names, [row["kl"] for row in rows], "mean KL from the exact model (nats)", "{:.1e}", log=True)
    plots.dots(right, names, [row["rows_share"] for row in rows], "share of rows recomputed", "{:.0%}")
