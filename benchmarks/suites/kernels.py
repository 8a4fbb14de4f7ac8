"""Page-sparse attention of one decoding step against every dense kernel that is installed, and against the time that
moving the bytes takes at least. Needs torch, and Triton on a GPU, but not vLLM; on a CPU with vLLM its attention kernel
is one of the dense ones. `python -m benchmarks correctness` compares the same kernels with their definitions.
"""

import argparse
from dataclasses import dataclass

from benchmarks.lib import plots
from benchmarks.lib.dense_kernels import chosen_by_vllm, dense_kernels
from benchmarks.lib.device import call_ms, device
from benchmarks.lib.page_cases import BUDGET, DIM, HEADS, KV_HEADS, PAGE, RECENT, SINK, PageCase, store_statistics
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table
from vllm_dlm.kernels.top_pages import top_pages

COLUMNS = columns(
    """
    keys | keys
    batch | batch
    dense_kernel | fastest dense kernel
    dense_ms | dense ms | {:.3f}
    score_ms | score ms | {:.3f}
    select_ms | select ms | {:.3f}
    attend_ms | attend ms | {:.3f}
    sparse_ms | all three ms | {:.3f}
    ratio | × dense | {:.1f}
    flash_ratio | × FlashAttention | {:.1f}
    served_ms | all three, vLLM's kernel attends, ms | {:.3f}
    served_ratio | × dense | {:.1f}
    bound_ms | byte bound ms | {:.3f}
    of_bound | of the bound | {:.0%}
    bound_ratio | bound: × dense | {:.1f}
    dense_of_bound | dense, of its bound | {:.0%}
    store_us | statistics of a full page, µs | {:.0f}
    failed | failed
    """
)
NOTES = [
    "All three: score, select and attend, timed together. Medians of one run; on a GPU in CUDA graphs, caches not "
    "flushed.",
    "vLLM's kernel attends: as a server on a CPU decodes, over a table of the chosen pages in vLLM's packed cache "
    "(vllm_dlm/page_sparse/cpu_pages.py); attend and all three are the project's kernels, torch alone.",
    "byte bound: mean and spread of all pages, then keys and values of the chosen ones, at the device's bandwidth, and "
    "share of it that the faster way attains; bound: × dense: the bytes of all keys and values over those.",
]
SETTINGS = {
    "shapes": f"{HEADS} query heads, {KV_HEADS} key heads of {DIM}, one query per request",
    "dtype": "bfloat16",
    "baseline": "in each row the fastest of the dense kernels that are installed, over all keys",
    "counted": "milliseconds of one layer's call, medians of repetitions",
    "page": PAGE,
    "budget_tokens": BUDGET,
    "sink_pages": SINK,
    "recent_pages": RECENT,
    "std_kind": "l2",
    "reduce": "max",
    "pages": "shuffled",
}
TELLING = [(32768, 8), (131072, 1), (131072, 8), (32768, 1), (32768, 32)]
FURTHER = [(8192, 1), (8192, 8), (8192, 32), (16384, 8), (65536, 8)]


@dataclass(frozen=True)
class Case:
    keys: int
    batch: int
    seconds: float = 1.0  # per timing


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    title = "Page-sparse decoding attention"
    own = {"kernels-cpu": f"{title} on a CPU", "gpu-kernels": title}
    return {name: Table(text, COLUMNS, NOTES, SETTINGS, finished, bars, plot) for name, text in own.items()}


def parts(options: argparse.Namespace) -> list[Part]:
    table = "gpu-kernels" if options.device == "cuda" else "kernels-cpu"
    if options.toy:
        return [part(table, "toy", [(2048, 1)], 2, 0.02)]
    if options.device == "cuda":
        return [part(table, "UNIQUE attention", TELLING, 2), part(table, "UNIQUE attention, further", FURTHER, 17)]
    return [part(table, "UNIQUE attention", [(8192, 1), (32768, 1), (131072, 1)], 2, 2.0)]


def part(table: str, name: str, places: list[tuple[int, int]], rank: int, seconds: float = 1.0) -> Part:
    cells = tuple(Cell(f"{keys} x{batch}", 0.3, Case(keys, batch, seconds)) for keys, batch in places)
    return Part("kernels", table, name, cells, 0.2, rank=rank, vllm=False)


def opened(part: Part, options: argparse.Namespace):
    def measure(case: Case) -> dict:
        made = PageCase.random(case.keys, case.batch, 1, device())
        return measured(made, case.seconds, options.peaks.bytes_per_s)

    return measure


def measured(case: PageCase, seconds: float, bandwidth: float) -> dict:
    here, keys, batch = case.q.device, int(case.kv_lens[0]), len(case.kv_lens)
    k = min(BUDGET // PAGE, case.page_table.shape[1])

    def ms(function) -> float:
        return call_ms(function, here, seconds)

    scores = case.score()
    chosen, one_page = top_pages(scores, k), case.page_table[:, -1].contiguous()
    dense = {name: ms(function) for name, function in dense_kernels(case).items()}
    best, flash = min(dense, key=dense.get), [took for name, took in dense.items() if "FlashAttention" in name]
    sparse = ms(lambda: case.attend(top_pages(case.score(), k)))
    served = (call := chosen_by_vllm(case, k)) and ms(call)
    element = case.pages.element_size()
    each_key, each_page = KV_HEADS * 2 * DIM * element, KV_HEADS * (DIM * element + 4)
    read = batch * (k * PAGE * each_key + case.page_table.shape[1] * each_page)
    bound, dense_bound = 1000 * read / bandwidth, 1000 * batch * keys * each_key / bandwidth
    row = {"keys": keys, "batch": batch, "dense_kernel": best, "dense_ms": dense[best], "dense": dense}
    row |= {"score_ms": ms(case.score), "select_ms": ms(lambda: top_pages(scores, k))}
    row |= {"attend_ms": ms(lambda: case.attend(chosen)), "sparse_ms": sparse, "ratio": dense[best] / sparse}
    row |= {"served_ms": served, "served_ratio": served and dense[best] / served}
    row |= {"bound_ms": bound, "of_bound": bound / min(sparse, served or sparse), "bound_ratio": dense_bound / bound}
    row |= {"dense_of_bound": dense_bound / dense[best]}
    row["store_us"] = 1000 * ms(lambda: store_statistics(case.pages, one_page, case.statistics))
    return row | ({"flash_ratio": min(flash) / sparse} if flash else {})


def finished(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (row.get("keys", 0), row.get("batch", 0)))


def bars(rows: list[dict]) -> list[str]:
    found = [row for row in rows if (row.get("keys"), row.get("batch")) == (32768, 8)]
    if not found:
        return []
    ratio, against = found[0].get("flash_ratio"), "FlashAttention"
    if ratio is None:
        ratio, against = found[0]["ratio"], f"{found[0]['dense_kernel']} (FlashAttention is not installed)"
    return [f"Bar: 32k keys, batch 8, at least 12.5 times dense FlashAttention: {ratio:.1f} times {against}."]


def plot(figure, rows: list[dict]) -> None:
    """How many times faster than the fastest dense kernel"""
    rows = [row for row in rows if "ratio" in row]
    served = any(row.get("served_ratio") for row in rows)
    groups = {}
    for row in rows:
        own = {"torch's kernels" if served else "score, select and attend": row["ratio"]}
        own |= {"vLLM's kernel attends": row["served_ratio"]} if served else {}
        keys = f"{row['keys']:,} keys" if served else f"{row['keys'] // 1024}k"
        groups[f"{keys}\nbatch {row['batch']}"] = own | {"by bytes alone": row["bound_ratio"]}
    if groups:
        plots.bars(figure.subplots(), groups, "times faster than the fastest dense kernel", "{:.1f}")
