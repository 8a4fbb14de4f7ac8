"""Milliseconds per decoded token at long context: vLLM's own attention, and the same with pages chosen by UNIQUE.

Random decoders, bfloat16 on the CPU, greedy. Both engines run one after the
other on the same cores, on caches full of random keys and values: what a
decoding step costs does not depend on them. Further engines, of a small float32
model, show that a budget of all pages gives vLLM's own text.
"""

import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks import drawing, load, report
from benchmarks.long_context import (
    SHAPES,
    Shape,
    checkpoint,
    close,
    decode,
    fill_cache,
    page_counts,
    skip_prompts,
    start,
)
from benchmarks.timed_engine import engine_environment, pinned

COLUMNS = [
    report.Column("shape", "model"),
    report.Column("method", "method"),
    report.Column("context", "context"),
    report.Column("batch", "requests"),
    report.Column("ms_per_token", "ms/step", "{:.1f}"),
    report.Column("tokens_per_s", "tokens/s", "{:.2f}"),
    report.Column("speedup", "× dense", "{:.2f}"),
    report.Column("pages_share", "pages read, choosing layers", "{:.1%}"),
    report.Column("kv_share", "keys read, all layers", "{:.1%}"),
]

NOTES = [
    "ms/step: wall time of a decoding step of all requests, from the step in which the last of them has its first "
    "token to the last token, over the steps between. Prompts do not count. The median of the repetitions after a "
    "warm-up; all of them are in the JSON file.",
    "dense: vLLM with its own CPU attention, without a dlm option; nothing of this project is in it.",
    "Several requests share one prompt (prefix cache) and with it physical pages; either method reads them once per "
    "request.",
    "Weights are random: this is about time, not about quality. In place of a prompt's keys and values the cache holds "
    "random ones, alike in both engines, because no decoding step's time depends on what they are; --real-prompts "
    "computes them.",
    "keys read, all layers: with those that read everything, by default the first two (dense_layers). The rest of a "
    "step is the weights, which neither method saves, and the smaller part the more requests share them.",
]


def listed(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def add_arguments(parser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--shapes", type=listed(str), help=f"of {', '.join(SHAPES)}; default: all but the last")
    parser.add_argument("--context", type=int, help="tokens before the first decoded one (default 32768)")
    parser.add_argument("--batches", type=listed(int), default=[1, 4], help="requests at once (default 1,4)")
    parser.add_argument("--new", type=int, default=33, help="tokens of a repetition (default 33)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--budget", type=int, help="budget_tokens (default UNIQUE's)")
    parser.add_argument("--page-size", type=int, help="default UNIQUE's")
    parser.add_argument("--real-prompts", action="store_true", help="prompts go through the model: takes long")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, for both engines")
    parser.add_argument("--threads", type=int, default=cores, help=f"for both engines (default {cores})")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a toy shape")
    parser.add_argument("--minutes", type=float, help="start no engine after so many")
    parser.add_argument("--resume", action="store_true", help="keep what the result file has under the same settings")
    parser.add_argument("--name", default="decode", help="of the result files")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    load.add_arguments(parser)


def run(args) -> None:
    os.environ.update(engine_environment(args.threads))
    Decode(args).run()


class Decode:
    """The table: what of it is known, what is missing, and how that is measured."""

    def __init__(self, args):
        self.args = args
        self.shapes = [SHAPES[name] for name in args.shapes or (["smoke"] if args.quick else list(SHAPES)[:-1])]
        self.context = args.context or (2048 if args.quick else 32768)
        toy = {"page_size": 32, "budget_tokens": 256, "min_context": 0} if args.quick else {}
        given = {"budget_tokens": args.budget, "page_size": args.page_size}
        self.selection = {"name": "unique"} | toy | {name: value for name, value in given.items() if value}
        self.methods = {
            "dense": None, "unique": self.selection, "unique, dense_layers []": self.selection | {"dense_layers": []},
        }  # fmt: skip
        self.settings = self.stated()
        path = args.results / f"{args.name}.json"
        old = report.resumed(path, self.settings, args.threads, args.busy or args.quick) if args.resume else None
        self.rows = old["rows"] if old else []
        self.earlier = old["settings"]["load"] if old else None
        self.equal = old["settings"].get("full_budget_equals_dense") if old else None

    def stated(self) -> dict:
        args = self.args
        return {
            "shapes": {shape.name: shape.describe(self.context) for shape in self.shapes},
            "dtype": "bfloat16",
            "baseline": "vLLM's own attention (dense), same engine, same cores, same run",
            "counted": "wall time of a decoding step of all requests, medians of repetitions; prompts do not count",
            "context": self.context,
            "batches": args.batches,
            "selection": selection_fields(self.selection),
            "engine": "eager" if args.eager else "vLLM's default on CPUs (torch.compile)",
            "prompts": "computed" if args.real_prompts else "random keys and values",
            "repetitions": args.repetitions,
            "tokens_per_repetition": args.new,
            "threads_pinned": pinned(),
        }

    def run(self) -> None:
        known = {(row["shape"], row["method"]) for row in self.rows}
        wanted = [(s, m) for s in self.shapes for m in self.methods if (s.name, m) not in known]
        if not wanted and self.equal:
            print(f"{self.args.name}.json has all of it already")
            return
        self.load = load.settle(self.args.busy or self.args.quick, self.args.patience)
        end = time.monotonic() + 60 * (self.args.minutes or float("inf"))
        with tqdm(total=len(wanted) + (not self.equal), desc=self.args.name, unit="engine") as progress:
            for shape, method in wanted:
                if time.monotonic() > end:
                    break
                progress.set_postfix_str(f"{shape.name} {method}")
                self.rows += measure(shape, method, self.methods[method], self.context, self.load, self.args)
                self.table().write(self.args.results)
                progress.update()
            if not self.equal and time.monotonic() < end:
                progress.set_postfix_str("equality")
                self.equal = equality(self.args)
                progress.update()
        if not self.rows:
            raise SystemExit(f"{self.args.name}: no minutes left for any engine")
        self.table().print()
        for path in self.table().write(self.args.results, plot):
            print(path)

    def table(self) -> report.Report:
        equal = {"full_budget_equals_dense": self.equal} if self.equal else {}
        return report.Report(
            name=self.args.name,
            title=f"Decoding at {self.context:,} tokens of context: pages chosen by UNIQUE against dense vLLM",
            settings=self.settings | equal | report.surroundings(self.args.threads, self.load, self.earlier),
            columns=COLUMNS, notes=[*NOTES, *([equality_note(self.equal)] if self.equal else [])],
            rows=with_ratios(self.rows),
        )  # fmt: skip


def selection_fields(selection: dict) -> dict:
    from vllm_dlm.options import server_options

    made = server_options({"selection": selection}, "low_confidence").selection
    return {"name": made.name} | asdict(made)


def measure(shape: Shape, method: str, selection: dict | None, context: int, around: load.Load, args) -> list[dict]:
    longest = context + 128 + 2 * args.new
    room = shape.kv_bytes(longest + 256 * (1 + max(args.batches)))
    llm = start(
        checkpoint(shape, longest), selection, longest, args, dtype="bfloat16",
        max_num_batched_tokens=min(4096, context), kv_cache_memory_bytes=int(1.06 * room),
    )  # fmt: skip
    if not args.real_prompts:
        llm.collective_rpc(skip_prompts)
    # One token more than whole blocks: repetitions find all but that one in the prefix cache.
    prompt = [(i * 7919 + 13) % (shape.vocabulary - 1) for i in range(context // 128 * 128 + 1)]
    decode(llm, prompt, 1, 2)  # finds the prompt in the prefix cache from now on
    if not args.real_prompts:
        llm.collective_rpc(fill_cache)
    rows = []
    for batch in args.batches:
        decode(llm, prompt, batch, 4)
        before = page_counts(llm) if selection else None
        with around.watch() as watch:
            seconds = [decode(llm, prompt, batch, args.new)[0] for _ in range(args.repetitions)]
        middle = statistics.median(seconds)
        row = {
            "shape": shape.name, "method": method, "context": context, "batch": batch,
            "seconds_per_step": seconds, "ms_per_token": 1000 * middle, "tokens_per_s": batch / middle,
        } | watch.beside  # fmt: skip
        if selection:
            counts = {name: value - before[name] for name, value in page_counts(llm).items()}
            share = counts["pages_read"] / counts["pages_seen"]
            choosing = 1 - len(selection_fields(selection)["dense_layers"]) / shape.layers
            row |= counts | {"pages_share": share, "kv_share": choosing * share + 1 - choosing}
        rows.append(row)
    close(llm)
    return rows


def equality(args) -> dict:
    """A small model in float32, where rounding decides nothing: tokens of vLLM's attention, and of all pages."""
    shape, context, new = SHAPES["smoke"], 1024, 65
    texts = {}
    for method, budget in (("dense", None), ("all pages", 1 << 20), ("256 tokens", 256)):
        selection = budget and {"name": "unique", "page_size": 32, "budget_tokens": budget, "min_context": 0}
        llm = start(
            checkpoint(shape, 2048, "float32"),
            selection,
            2048,
            args,
            dtype="float32",
            kv_cache_memory_bytes=1 << 26,
        )
        prompts = [[(i * 31 + seed * 7) % 511 for i in range(context)] for seed in range(8)]
        texts[method] = [decode(llm, prompt, 1, new)[1][0] for prompt in prompts]
        close(llm)
    equal = {
        method: sum(a == b for a, b in zip(texts[method], texts["dense"], strict=True)) for method in list(texts)[1:]
    }
    return {"texts": 8, "tokens_of_each": new, "context": context} | {f"equal_with_{k}": n for k, n in equal.items()}


def equality_note(equal: dict) -> str:
    return (
        f"Of {equal['texts']} texts of {equal['tokens_of_each']} tokens of a small float32 model, "
        f"{equal['equal_with_all pages']} are vLLM's own with a budget of all pages, and "
        f"{equal['equal_with_256 tokens']} with a budget of 256 of their {equal['context']} tokens."
    )


def with_ratios(rows: list[dict]) -> list[dict]:
    dense = {(row["shape"], row["batch"]): row for row in rows if row["method"] == "dense"}
    for row in rows:
        if base := dense.get((row["shape"], row["batch"])):
            row["speedup"] = base["ms_per_token"] / row["ms_per_token"]
    return rows


def plot(figure, rows: list[dict]) -> None:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        requests = "1 request" if row["batch"] == 1 else f"{row['batch']} requests"
        group = groups.setdefault(f"{row['shape']}\n{requests}", {})
        group[row["method"]] = row["ms_per_token"]
    drawing.bars(figure.subplots(), groups, "ms per decoding step of all requests")
