"""What reuse costs in quality, on the demo checkpoint: exact match, and how far distributions drift from `none`.

Exact match alone cannot rank refresh policies (a prompt cache that is never
refreshed answers retrieval as well), so every step of every policy is also
compared with a full forward over the same canvas: does the position it fills
get the token the exact model would give, and what is the divergence of the
two distributions?
"""

import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import drawing, quality_rules, quality_walks, report
from benchmarks.load import Load
from benchmarks.workload import Policy
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.denoiser import Observer, plain_stream

CHECKPOINT = Path(__file__).resolve().parents[1] / "vllm_dlm" / "demo" / "checkpoint"
CANVAS, BLOCK = 32, 8

#: the policies at their defaults, which are held to the exact match of `none`
DEFAULTS = ["none", "fast_dllm:cache=prefix", "fast_dllm:cache=dual", "dllm_cache", "dyllm"]
#: one field varied at a time
CURVES = {
    "prompt interval": [f"dllm_cache:prompt_interval={n}" for n in (4, 16, 100)],
    "response interval": [f"dllm_cache:response_interval={n}" for n in (2, 4, 16, 32)],
    "ratio": [f"dllm_cache:transfer_ratio={share}" for share in (0.0, 0.1, 0.5, 1.0)],
    "threshold": [f"dyllm:threshold={tau}" for tau in (0.9, 0.98, 0.99, 0.999)],
    "whole steps": [f"dyllm:whole_interval={n}" for n in (0, 4, 16)],
    "drift control": [f"dyllm:refresh_interval={n}" for n in (4, 8, 16)],
}

COLUMNS = [
    report.Column("policy", "policy"),
    report.Column("prompts", "prompts"),
    report.Column("exact_match", "exact match", "{:.1%}"),
    report.Column("vs_none", "points vs none", "{:+.1f}"),
    report.Column("agreement", "agreement", "{:.2%}"),
    report.Column("kl", "mean KL", "{:.2e}"),
    report.Column("rows_share", "rows recomputed", "{:.1%}"),
]

NOTES = [
    f"Demo checkpoint, greedy, canvas of {CANVAS} tokens, blocks of {BLOCK}, one token per step, ended by the end "
    "token. Exact match: the whole answer, end token included.",
    "agreement: share of filled positions that got the token the exact model gives on the same canvas. mean KL: of the "
    "exact model's distribution from the policy's, over all masked positions of the block, in nats.",
    "rows recomputed: rows through the FFN, of canvas x layers x steps.",
]


def add_arguments(parser) -> None:
    parser.add_argument("--prompts", type=int, default=500, help="for the exact match of the defaults (default 500)")
    parser.add_argument("--drift-prompts", type=int, default=100, help="for agreement and KL (default 100)")
    parser.add_argument("--rules", action="store_true", help="every decoding on canvases of some lengths, instead")
    parser.add_argument("--walks", action="store_true", help="every decoding on long answers, instead")
    parser.add_argument("--resume", action="store_true", help="of these: keep the cells that the result file has")
    parser.add_argument("--answers", type=int, default=60, help="of each cell of --rules (default 60)")
    parser.add_argument("--quick", action="store_true", help="a handful of prompts")
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    if args.rules:
        return run_rules(args)
    if args.walks:
        return run_walks(args)
    many, some = (8, 4) if args.quick else (args.prompts, args.drift_prompts)
    load = Load(timed=False)
    engine = Engine()
    policies = [Policy.parse(text) for text in (*DEFAULTS, *(text for curve in CURVES.values() for text in curve))]
    samples = questions(max(many, some))
    rows = []
    with tqdm(total=len(DEFAULTS) * many + len(policies) * some, desc="quality", unit="prompt") as progress:
        for policy in policies:
            progress.set_postfix_str(policy.label)
            row = {"policy": policy.label} | engine.drift(policy, samples[:some], progress)
            if policy.label in DEFAULTS:
                row |= {"prompts": many, "exact_match": engine.exact_match(policy, samples[:many], progress)}
            rows.append(row)
    for row in rows:
        if "exact_match" in row:
            row["vs_none"] = 100 * (row["exact_match"] - rows[0]["exact_match"])
    result = report.Report(
        name="quality",
        title="Quality of feature reuse on the demo checkpoint",
        settings=settings(many, some) | report.surroundings(torch.get_num_threads(), load),
        columns=COLUMNS, notes=NOTES, rows=rows,
    )  # fmt: skip
    result.print()
    for path in result.write(args.results, plot):
        print(path)


def run_rules(args) -> None:
    answers = 5 if args.quick else args.answers
    samples = quality_rules.questions(answers)
    measure_cells(
        args, quality_rules, Engine(max_model_len=1024), lambda canvas: samples,
        ("quality-rules", "Tokens filled at once, under every reuse, on canvases of some lengths"),
        quality_rules.settings(answers), quality_rules.BLOCK,
    )  # fmt: skip


def run_walks(args) -> None:
    counts = {canvas: 2 if args.quick else count for canvas, count in quality_walks.ANSWERS.items()}
    samples = {canvas: quality_walks.questions(canvas, count) for canvas, count in counts.items()}
    measure_cells(
        args, quality_walks, Engine(max_model_len=1024, checkpoint=quality_walks.CHECKPOINT), samples.__getitem__,
        ("quality-walks", "Tokens filled at once in long answers whose words need each other"),
        quality_walks.settings(), quality_walks.BLOCK,
    )  # fmt: skip


def measure_cells(args, table, engine: "Engine", samples_of, called: tuple[str, str], settings: dict, block: int):
    """`table`: the module of the result, with its cells and columns. Each cell is written when it is there."""
    load, rows, (name, title) = Load(timed=False), [], called
    if args.resume and (known := args.results / f"{name}.json").exists():
        kept = report.Report.read(known, []).rows
        rows += [row for row in kept if row["answers"] == len(samples_of(row["canvas"]))]
    about_all = settings | report.surroundings(torch.get_num_threads(), load)
    result = report.Report(name, title, about_all, table.COLUMNS, table.NOTES, rows)
    cells = list(table.cells(args.quick))
    for canvas, extent, reuse, rule, options in tqdm(cells, desc=name, unit="cell"):
        about = {"decoding": rule.label, "reuse": reuse, "extent": extent, "canvas": canvas}
        if any(about.items() <= row.items() for row in rows):
            continue
        rows.append(about | quality_rules.measure(engine, canvas, options, samples_of(canvas), block))
        rows.sort(key=table.place)
        left = f"{len(rows)} of {len(cells)} cells; `--resume` measures the others."
        result.notes = [*table.NOTES, left] if len(rows) < len(cells) else table.NOTES
        result.write(args.results)
    for path in result.write(args.results, table.plot):
        print(path)


def settings(many: int, some: int) -> dict:
    return {
        "shapes": f"demo checkpoint, canvas of {CANVAS}, blocks of {BLOCK}", "dtype": "float32",
        "baseline": "none, the exact model, on the same prompts and canvases",
        "counted": "whole answers; drift over the masked positions of every step",
        "tasks": "equal shares of recall at 256 tokens (8 needles, 2 asked for), copy, sort, addition, totals",
        "prompts": {"exact match": many, "drift": some},
    }  # fmt: skip


def questions(count: int):
    from examples.demo import tasks

    rng, filler = np.random.default_rng(31), tasks.Filler(7)
    kinds = [
        lambda: tasks.recall(rng, filler, 256, needles=8, queried=2),
        *(lambda make=make: make(rng) for make in (tasks.copy, tasks.sort, tasks.add, tasks.totals)),
    ]
    return [kinds[index % len(kinds)]() for index in range(count)]


class Drift(Observer):
    """Each step as the policy does it beside the exact model over the same canvases; sums over the filled positions
    and the masked rows of all steps."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.filled = self.agreed = self.rows = self.recomputed = self.dense = 0
        self.kl = 0.0
        self.got: dict[str, torch.Tensor] = {}

    def head_read(self, hidden, requests) -> None:
        self.got = {request.state.req_id: self.logprobs(hidden[request.rows]) for request in requests}

    def step_ended(self, requests, counts) -> None:
        streams = [plain_stream(r.state.canvas.tokens, r.positions) for r in requests]
        exact = self.logprobs(self.denoiser.forward(streams, Counts()))
        for request, want in zip(requests, exact.split([len(r.positions) for r in requests]), strict=True):
            got = self.got[request.state.req_id]
            self.kl += (want.exp() * (want - got)).sum().item()
            self.rows += len(want)
            chosen = int(np.argmax(request.proposal.score))  # one token per step: the most confident one
            self.agreed += int(want[chosen].argmax() == request.proposal.token[chosen])
            self.filled += 1
        self.recomputed += counts.rows["feed_forward"]
        self.dense += len(self.denoiser.model.model.layers) * sum(len(r.state.canvas) for r in requests)

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.denoiser.model.compute_logits(hidden).float().log_softmax(-1)


class Engine:
    """The served engine inside this process, so that each step can be looked at."""

    def __init__(self, max_model_len: int = 512, rows: int = 4096, checkpoint: Path = CHECKPOINT):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self.llm = LLM(
            str(checkpoint), dtype="float32", max_model_len=max_model_len, enforce_eager=True,
            kv_cache_memory_bytes=1 << 29, max_num_seqs=16,
            max_num_batched_tokens=max(rows, max_model_len), disable_log_stats=True,
        )  # fmt: skip
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler, self.runner = core.scheduler, core.model_executor.driver_worker.worker.model_runner

    def options(self, policy: Policy):
        from vllm_dlm.options import server_options

        return server_options(policy.server, "low_confidence")

    def generate(self, policy: Policy, samples) -> list[list[int]]:
        from vllm import SamplingParams

        options = self.options(policy)
        self.scheduler.dlm_options = options
        params = SamplingParams(
            temperature=0, max_tokens=CANVAS, detokenize=False,
            extra_args={"dlm_block_length": BLOCK, **getattr(policy, "request", {})},
        )  # fmt: skip
        outputs = self.llm.generate([{"prompt_token_ids": s.prompt_ids} for s in samples], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def exact_match(self, policy: Policy, samples, progress) -> float:
        right = 0
        for start in range(0, len(samples), 16):
            part = samples[start : start + 16]
            answers = self.generate(policy, part)
            right += sum(got == sample.answer_ids for got, sample in zip(answers, part, strict=True))
            progress.update(len(part))
        return right / len(samples)

    def drift(self, policy: Policy, samples, progress) -> dict:
        observers, sums = self.runner.denoiser.observers, Drift(self.runner.denoiser)
        observers.append(sums)
        try:
            for start in range(0, len(samples), 16):
                part = samples[start : start + 16]
                self.generate(policy, part)
                progress.update(len(part))
        finally:
            observers.remove(sums)
        return {
            "agreement": sums.agreed / sums.filled, "kl": sums.kl / sums.rows,
            "rows_share": sums.recomputed / sums.dense,
        }  # fmt: skip


def plot(figure, rows: list[dict]) -> None:
    """Drift and rows recomputed side by side, a line of the picture per policy."""
    figure.set_size_inches(9, 7.5)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["policy"] for row in rows]
    drawing.dots(left, names, [row["kl"] for row in rows], "mean KL from the exact model (nats)", "{:.1e}", log=True)
    drawing.dots(right, names, [row["rows_share"] for row in rows], "share of rows recomputed", "{:.0%}")
