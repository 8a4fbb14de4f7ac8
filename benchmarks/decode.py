"""Milliseconds per decoded token at long context: vLLM's own attention, and the same vLLM with pages chosen by UNIQUE.

Random decoders, bfloat16 on the CPU, greedy. Both engines run one after the
other on the same cores, on caches full of random keys and values: what a
decoding step costs does not depend on them. Two further engines, of a small float32
model, show that a budget of all pages gives vLLM's own text.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks import report
from benchmarks.checkpoints import CACHE
from benchmarks.measure import engine_environment

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
    "token to the last token, over the steps between. Prompts do not count. The fastest repetition "
    "after a warm-up, which others on the machine disturbed least; all of them are in the JSON file.",
    "dense: vLLM with its own CPU attention, without a dlm option; nothing of this project is in it.",
    "Several requests share one prompt (prefix cache) and with it physical pages; either method reads them once per "
    "request.",
    "Weights are random: this is about time, not about quality. In place of a prompt's keys and values the cache holds "
    "random ones, alike in both engines, because no decoding step's time depends on what they are; --real-prompts "
    "computes them.",
    "keys read, all layers: with those that read everything, by default the first two (dense_layers). The rest of a step "
    "is the weights, which neither method saves, and the smaller part the more requests share them.",
]


@dataclass(frozen=True)
class Shape:
    """Proportions of a known model, with a small vocabulary."""

    name: str
    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int = 8192

    def config(self, context: int):
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.family, hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, intermediate_size=self.feed_forward,
            vocab_size=self.vocabulary, max_position_embeddings=context, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=self.vocabulary - 1,
        )  # fmt: skip

    @property
    def weights(self) -> int:
        """Bytes of a step's weights in bfloat16."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (self.layers * (attention + 3 * self.width * self.feed_forward) + self.width * self.vocabulary)

    def kv_bytes(self, context: int) -> int:
        return self.layers * context * self.kv_heads * self.head_dim * 4

    def describe(self, context: int) -> dict:
        return asdict(self) | {
            "weight_mib": self.weights >> 20,
            "kv_mib_per_request": self.kv_bytes(context) >> 20,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2-0.5b", "qwen2", 896, 24, 14, 2, 64, 4864),
        Shape("qwen1.5-0.5b", "qwen2", 1024, 24, 16, 16, 64, 2816),
        Shape("qwen3-0.6b", "qwen3", 1024, 28, 16, 8, 128, 3072),
        Shape("smoke", "qwen2", 128, 4, 4, 2, 32, 192, 512),
    )
}


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
    parser.add_argument("--name", default="decode", help="of the result files")
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    os.environ.update(engine_environment(args.threads))
    shapes = [SHAPES[name] for name in args.shapes or (["smoke"] if args.quick else list(SHAPES)[:-1])]
    context = args.context or (2048 if args.quick else 32768)
    selection = {"name": "unique"} | ({"page_size": 32, "budget_tokens": 256, "min_context": 0} if args.quick else {})
    selection |= {"budget_tokens": args.budget} if args.budget else {}
    selection |= {"page_size": args.page_size} if args.page_size else {}
    before = report.load_average()
    rows = []
    methods = {"dense": None, "unique": selection, "unique, dense_layers []": selection | {"dense_layers": []}}
    with tqdm(total=len(methods) * len(shapes) + 1, desc="decode", unit="engine") as progress:
        for shape in shapes:
            for method, chosen in methods.items():
                progress.set_postfix_str(f"{shape.name} {method}")
                rows += measure(shape, method, chosen, context, args)
                progress.update()
        progress.set_postfix_str("equality")
        equal = equality(args)
        progress.update()
    result = report.Report(
        name=args.name,
        title=f"Decoding at {context} tokens of context: pages chosen by UNIQUE against dense vLLM",
        settings={
            "model": {shape.name: shape.describe(context) for shape in shapes},
            "dtype": "bfloat16",
            "selection": selection_fields(selection),
            "engine": "eager" if args.eager else "vLLM's default on CPUs (torch.compile)",
            "repetitions": args.repetitions,
            "tokens_per_repetition": args.new,
            "full_budget_equals_dense": equal,
            "machine": report.machine(args.threads),
            "versions": report.versions(),
            "load_average_before": before,
            "load_average_after": report.load_average(),
        },
        columns=COLUMNS,
        notes=[*NOTES, equality_note(equal)],
        rows=with_ratios(rows),
    )
    result.print()
    for path in result.write(args.results, plot):
        print(path)


def selection_fields(selection: dict) -> dict:
    from vllm_dlm.options import server_options

    made = server_options({"selection": selection}, "low_confidence").selection
    return {"name": made.name} | asdict(made)


def checkpoint(shape: Shape, context: int, dtype: str = "bfloat16") -> Path:
    """Folder of a random checkpoint; written if it is not there yet."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = CACHE / f"{shape.name}-{context}-{dtype}"
    done = folder / "shape.json"
    if not done.exists() or json.loads(done.read_text()) != asdict(shape):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape.config(context), torch_dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
        done.write_text(json.dumps(asdict(shape)))
    return folder


def start(folder: Path, selection: dict | None, context: int, args, **settings):
    from vllm import LLM

    if selection is not None:
        settings["additional_config"] = {"dlm": {"selection": selection}}
    return LLM(
        str(folder), max_model_len=context, max_num_seqs=max(args.batches), skip_tokenizer_init=True,
        enforce_eager=args.eager, disable_log_stats=True, use_tqdm_on_load=False, **settings,
    )  # fmt: skip


def measure(shape: Shape, method: str, selection: dict | None, context: int, args) -> list[dict]:
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
        seconds = [decode(llm, prompt, batch, args.new)[0] for _ in range(args.repetitions)]
        row = {
            "shape": shape.name, "method": method, "context": context, "batch": batch,
            "seconds_per_step": [round(second, 5) for second in seconds],
            "ms_per_token": 1000 * min(seconds), "tokens_per_s": batch / min(seconds),
        }  # fmt: skip
        if selection:
            counts = {name: value - before[name] for name, value in page_counts(llm).items()}
            share = counts["pages_read"] / counts["pages_seen"]
            choosing = 1 - len(selection_fields(selection)["dense_layers"]) / shape.layers
            row |= counts | {"pages_share": share, "kv_share": choosing * share + 1 - choosing}
        rows.append(row)
    close(llm)
    return rows


def page_counts(llm) -> dict:
    (counts,) = llm.collective_rpc("dlm_page_counts")
    return counts


def close(llm) -> None:
    llm.llm_engine.engine_core.shutdown()


def skip_prompts(worker) -> None:
    """Long chunks do not go through the model; short ends of prompts, and decoding, do."""
    import torch

    model = worker.model_runner.model
    forward, width = model.forward, worker.model_config.get_hidden_size()

    def without_prompts(*rest, positions, **more):
        if (count := positions.shape[-1]) > 256:
            return torch.zeros(count, width, dtype=worker.model_config.dtype)
        return forward(*rest, positions=positions, **more)

    model.forward = without_prompts


def fill_cache(worker) -> None:
    """Random keys and values in every page, and statistics of them."""
    import torch

    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        pages = layer.kv_cache
        piece = torch.randn(8, *pages.shape[1:]).to(pages.dtype)
        for start in range(0, len(pages), len(piece)):
            pages[start : start + len(piece)] = piece[: len(pages) - start].roll(start, 1)
        if (statistics := getattr(layer.impl, "statistics", None)) is not None:
            for ids in torch.arange(len(statistics.mean)).split(256):
                layer.impl.describe(pages, ids)


def decode(llm, prompt: list[int], batch: int, new: int) -> tuple[float, list[list[int]]]:
    """Seconds per decoding step, and the tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    engine = llm.llm_engine
    tokens = {f"{time.monotonic_ns()}-{i}": [] for i in range(batch)}
    for name in tokens:
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    begin, done = None, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] += output.outputs[0].token_ids
        if begin is None and all(tokens.values()):
            begin, done = time.perf_counter(), min(map(len, tokens.values()))
    return (time.perf_counter() - begin) / max(1, new - done), list(tokens.values())


def equality(args) -> dict:
    """A small model in float32, where rounding decides nothing: tokens of vLLM's attention and of a budget of all pages."""
    shape, context, new = SHAPES["smoke"], 1024, 65
    texts = {}
    for method, budget in (("dense", None), ("all pages", 1 << 20), ("256 tokens", 256)):
        selection = budget and {"name": "unique", "page_size": 32, "budget_tokens": budget, "min_context": 0}
        llm = start(
            checkpoint(shape, 2048, "float32"), selection, 2048, args, dtype="float32", kv_cache_memory_bytes=1 << 26
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
        row["speedup"] = dense[row["shape"], row["batch"]]["ms_per_token"] / row["ms_per_token"]
    return rows


def plot(axes, rows: list[dict]) -> None:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        requests = "1 request" if row["batch"] == 1 else f"{row['batch']} requests"
        group = groups.setdefault(f"{row['shape']}\n{requests}", {})
        group[row["method"]] = row["ms_per_token"]
    report.grouped_bars(axes, groups, "ms per decoding step")
