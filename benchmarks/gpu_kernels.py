"""The table of page-sparse attention on a GPU: one decoding step of a layer, against every dense kernel there is."""

from dataclasses import dataclass

from benchmarks import drawing, kernels, report
from benchmarks.gpu_device import device
from benchmarks.gpu_parts import Cell, Part
from benchmarks.gpu_shapes import Peaks
from benchmarks.kernel_cases import BUDGET, DIM, HEADS, KV_HEADS, PAGE, Case

TITLE = "Page-sparse decoding attention"
COLUMNS = [
    *kernels.COLUMNS[:9],
    report.Column("flash_ratio", "× FlashAttention", "{:.1f}"),
    report.Column("bound_ms", "byte bound ms", "{:.3f}"),
    report.Column("of_bound", "of the bound", "{:.0%}"),
    report.Column("bound_ratio", "bound: × dense", "{:.1f}"),
    report.Column("dense_of_bound", "dense, of its bound", "{:.0%}"),
    report.Column("store_us", "statistics of a full page, µs", "{:.0f}"),
    report.Column("failed", "failed"),
]
SETTINGS = {
    "shapes": f"{HEADS} query heads, {KV_HEADS} key heads of {DIM}, one query per request",
    "dtype": "bfloat16",
    "baseline": "in each row the fastest of the dense kernels that are here, over all keys",
    "counted": "milliseconds of one layer's call, medians of repetitions, in a graph as a server launches it",
    "page": PAGE,
    "budget_tokens": BUDGET,
}
NOTES = [
    "All three: score, select and attend together, timed as one, by events over ten launches in a row; caches not "
    "flushed.",
    "byte bound: mean and spread of all pages, then keys and values of the chosen ones, at the bandwidth the bounds of "
    "all tables take; dense, of its bound: the same for all keys and values.",
]


@dataclass(frozen=True)
class Place:
    keys: int
    batch: int
    seconds: float = 1.0


def opened(part: Part, peaks: Peaks):
    here = device()

    def measure(cell: Cell) -> dict:
        place = cell.what
        case = Case.random(place.keys, place.batch, 1, here)
        row = kernels.measure(case, place.seconds, peaks.bytes_per_s)
        flash = [ms for name, ms in row["dense"].items() if "FlashAttention" in name]
        dense_bytes = 2 * DIM * case.pages.element_size() * KV_HEADS * place.keys * place.batch
        row["dense_of_bound"] = 1000 * dense_bytes / peaks.bytes_per_s / row["dense_ms"]
        return row | ({"flash_ratio": min(flash) / row["sparse_ms"]} if flash else {})

    return measure


def finished(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (row.get("keys", 0), row.get("batch", 0)))


def bars(rows: list[dict]) -> list[str]:
    """What was promised, and what was found."""
    found = [row for row in rows if (row.get("keys"), row.get("batch")) == (32768, 8)]
    if not found:
        return []
    row = found[0]
    ratio, against = row.get("flash_ratio"), "FlashAttention"
    if ratio is None:
        ratio, against = row["ratio"], f"{row['dense_kernel']} (no FlashAttention is here)"
    return [f"Bar: 32k keys, batch 8, at least 12.5 times dense FlashAttention: {ratio:.1f} times {against}."]


def plot(figure, rows: list[dict]) -> None:
    """How many times faster than dense kernels; by bytes alone as a mark beside them."""
    groups = {
        f"{row['keys'] // 1024}k\nbatch {row['batch']}": {
            "score, select and attend": row["ratio"], "by bytes alone": row["bound_ratio"],
        }
        for row in rows if "ratio" in row
    }  # fmt: skip
    if groups:
        drawing.bars(figure.subplots(), groups, "times faster than the fastest dense kernel", "{:.1f}")
