"""Page-sparse against dense attention, one decoding step: checked against its definition, then timed.

Score, selection and attention over the chosen pages, beside every dense kernel
that is here and the time that moving the bytes alone would take. Needs torch
(and Triton on a GPU), not vLLM; where vLLM is installed on a CPU, its own
attention kernel is one of the dense ones.
"""

import statistics
import time
from pathlib import Path

import torch

from benchmarks import drawing, load, report
from benchmarks.dense_kernels import chosen_by_vllm, dense_kernels
from benchmarks.kernel_cases import (
    BUDGET,
    DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    RECENT,
    SINK,
    Case,
    check,
    store_statistics,
    top_pages,
)

COLUMNS = [
    report.Column("keys", "keys"),
    report.Column("batch", "batch"),
    report.Column("dense_kernel", "fastest dense kernel"),
    report.Column("dense_ms", "dense ms", "{:.3f}"),
    report.Column("score_ms", "score ms", "{:.3f}"),
    report.Column("select_ms", "select ms", "{:.3f}"),
    report.Column("attend_ms", "attend ms", "{:.3f}"),
    report.Column("sparse_ms", "all three ms", "{:.3f}"),
    report.Column("ratio", "× dense", "{:.1f}"),
    report.Column("served_ms", "all three, vLLM's kernel attends, ms", "{:.3f}"),
    report.Column("served_ratio", "× dense", "{:.1f}"),
    report.Column("bound_ms", "byte bound ms", "{:.3f}"),
    report.Column("of_bound", "of the bound", "{:.0%}"),
    report.Column("bound_ratio", "bound: × dense", "{:.1f}"),
    report.Column("store_us", "statistics of a full page, µs", "{:.0f}"),
]


def add_arguments(parser) -> None:
    parser.add_argument("--keys", default="8192,32768,131072", help="context lengths (default 8192,32768,131072)")
    parser.add_argument("--batches", help="default 1; on a GPU 1,8,32")
    parser.add_argument("--queries", type=int, default=1, help="per request (default 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per timing (default 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-checks", action="store_true", help="time only")
    parser.add_argument("--quick", action="store_true", help="short contexts, short timings")
    parser.add_argument("--threads", type=int, help="on a CPU (default: torch's)")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    parser.add_argument("--resume", action="store_true", help="keep what the result file has under the same settings")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    load.add_arguments(parser)


def run(args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    lengths = [2048] if args.quick else [int(n) for n in args.keys.split(",")]
    batches = [int(n) for n in (args.batches or ("1,8,32" if device.type == "cuda" else "1")).split(",")]
    seconds = 0.05 if args.quick else args.seconds
    wanted = [
        (n, batch) for n in lengths for batch in batches if batch * n * 4 * KV_HEADS * DIM <= memory_limit(device)
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    path = args.results / f"kernels-{name.lower().replace(' ', '-')}.json"
    about = settings(args, name, seconds)
    old = report.resumed(path, about, torch.get_num_threads(), args.busy or args.quick) if args.resume else None
    rows, checked = (old["rows"], old["settings"]["checked"]) if old else ([], 0)
    wanted = [place for place in wanted if place not in {(row["keys"], row["batch"]) for row in rows}]
    if not wanted:
        print(f"{path.name} has all of it already")
        return
    around = load.settle(args.busy or args.quick, args.patience)
    end = time.monotonic() + 60 * (args.minutes or float("inf"))
    checked = checked or (0 if args.no_checks else check(device))
    with around.watch():
        bandwidth = measure_bandwidth(device, seconds)

    def table() -> report.Report:
        return report.Report(
            path.stem, f"Page-sparse decoding attention on {name}",
            about | {"checked": checked, "bytes_per_s": f"{bandwidth:.3g}"}
            | report.surroundings(torch.get_num_threads(), around, old and old["settings"]["load"]),
            COLUMNS, notes(rows, checked), sorted(rows, key=lambda row: (row["keys"], row["batch"])),
        )  # fmt: skip

    for keys, batch in wanted:
        if time.monotonic() > end:
            break
        with around.watch() as watch:
            row = measure(Case.random(keys, batch, args.queries, device), seconds, bandwidth)
        rows.append(row | watch.beside)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()})
        table().write(args.results)
    if not rows:
        raise SystemExit(f"{path.stem}: no minutes left for any case")
    table().print()
    for written in table().write(args.results, plot):
        print(written)


def settings(args, name: str, seconds: float) -> dict:
    return {
        "shapes": f"{HEADS} query heads, {KV_HEADS} key heads of {DIM}, {args.queries} query per request",
        "dtype": "bfloat16",
        "baseline": "in each row the fastest of the dense kernels that are installed, over all keys",
        "counted": "milliseconds of one layer's call, medians of repetitions",
        "device": name, "page": PAGE, "budget_tokens": BUDGET, "sink_pages": SINK, "recent_pages": RECENT,
        "std_kind": "l2", "reduce": "max", "pages": "shuffled", "seconds_per_timing": seconds,
    }  # fmt: skip


def notes(rows: list[dict], checked: int) -> list[str]:
    return [
        "All of one run. Medians over repetitions; a GPU is timed with events over launches in a row, caches not "
        "flushed. All three: score, select and attend together, timed as one.",
        "vLLM's kernel attends: as a server on a CPU decodes, over a table of the chosen pages in vLLM's packed cache "
        "(vllm_dlm/page_sparse/cpu_pages.py); attend and all three beside it are the project's kernels, torch alone.",
        "Dense kernels tried: " + ", ".join(sorted({name for row in rows for name in row["dense"]})) + ".",
        "byte bound: mean and spread of all pages, then keys and values of the chosen ones, at the bandwidth that "
        "summing a large tensor reaches here, and how much of it the faster way attains; bound: × dense is the same "
        "for the bytes of all keys and values over those.",
        f"{checked} cases compared with the definitions in float64 before." if checked else "Not checked in this run.",
    ]  # fmt: skip


def memory_limit(device: torch.device) -> float:
    return 0.35 * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 4e9


def timed(function, device: torch.device, seconds: float) -> float:
    """Median milliseconds of a call."""
    function()
    function()
    if device.type == "cpu":
        took, begin = [], time.perf_counter()
        while len(took) < 3 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            function()
            took.append(time.perf_counter() - start)
        return 1000 * statistics.median(took)
    took, begin = [], time.perf_counter()
    while len(took) < 3 or time.perf_counter() - begin < seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            function()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 10)
    return statistics.median(took)


def graphed(function, device: torch.device):
    """On a GPU the function as a graph, which is how a server launches it; elsewhere itself."""
    if device.type == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second of reading: a sum over more than any cache holds."""
    big = torch.ones(1 << (31 if device.type == "cuda" else 28), dtype=torch.int8, device=device).view(torch.int64)
    return big.nbytes / (timed(big.sum, device, seconds) / 1000)


def measure(case: Case, seconds: float, bandwidth: float) -> dict:
    device, keys = case.q.device, int(case.kv_lens[0])
    batch, k = len(case.kv_lens), min(BUDGET // PAGE, case.page_table.shape[1])
    scores = case.score()
    chosen = top_pages(scores, k)

    def all_three():
        return case.attend(top_pages(case.score(), k))

    dense = {name: timed(graphed(function, device), device, seconds) for name, function in dense_kernels(case).items()}
    best = min(dense, key=dense.get)
    sparse = timed(graphed(all_three, device), device, seconds)
    served = (call := chosen_by_vllm(case, k)) and timed(call, device, seconds)
    element = case.pages.element_size()
    kv_bytes = batch * keys * KV_HEADS * 2 * DIM * element
    read = batch * k * PAGE * KV_HEADS * 2 * DIM * element + batch * case.page_table.shape[1] * KV_HEADS * (
        DIM * element + 4
    )
    bound = 1000 * read / bandwidth
    one_page = case.page_table[:, -1].contiguous()
    return {
        "keys": keys, "batch": batch, "dense_kernel": best, "dense_ms": dense[best], "dense": dense,
        "score_ms": timed(graphed(case.score, device), device, seconds),
        "select_ms": timed(graphed(lambda: top_pages(scores, k), device), device, seconds),
        "attend_ms": timed(graphed(lambda: case.attend(chosen), device), device, seconds),
        "sparse_ms": sparse, "ratio": dense[best] / sparse,
        "served_ms": served, "served_ratio": served and dense[best] / served,
        "bound_ms": bound, "of_bound": bound / min(sparse, served or sparse),
        "bound_ratio": kv_bytes / read,
        "store_us": 1000 * timed(
            graphed(lambda: store_statistics(case.pages, one_page, case.statistics), device), device, seconds
        ),
    }  # fmt: skip


def plot(figure, rows: list[dict]) -> None:
    """How many times faster than the fastest dense kernel; by bytes alone as a mark over each pair."""
    axes, groups = figure.subplots(), {}
    for row in rows:
        groups[f"{row['keys']:,} keys\nbatch {row['batch']}"] = {
            "torch's kernels": row["ratio"], "vLLM's kernel attends": row["served_ratio"],
            "by bytes alone": row["bound_ratio"],
        }  # fmt: skip
    drawing.bars(axes, groups, "times faster than the fastest dense kernel")
