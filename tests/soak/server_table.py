"""The table of a run at a server, and the picture of its memory."""

from benchmarks.lib import report
from tests.soak import memory, served

UNITS = {"rss_kib": "MiB", "threads": "threads", "descriptors": "descriptors"}

COLUMNS = [report.Column("process", "process"), report.Column("samples", "samples", lambda own: str(len(own)))]
for _measure, _unit in UNITS.items():
    COLUMNS += [
        report.Column(f"{_measure}_first", f"{_unit} after warm-up", "{:.1f}"),
        report.Column(f"{_measure}_last", f"{_unit} at the end", "{:.1f}"),
        report.Column(f"{_measure}_growth", f"{_unit} per 1,000 requests"),
    ]
COLUMNS.append(report.Column("least_growth", f"least MiB of each {memory.LEAST_OF:,} requests, per 1,000"))
COLUMNS.append(report.Column("grows", "grows"))

NOTES = [
    "Every process of the server while it is idle, after each wave of clients. Growth: slope of a line through the "
    f"means of {memory.STRETCHES} stretches of the samples after the first {memory.WARM_UP:.0%}, ± its standard error.",
    f"least: slope of a line through the least resident memory of each stretch of {memory.LEAST_OF:,} requests after "
    "the warm-up, ± its standard error; with fewer than three stretches there is no error.",
    "grows: the slope is above three standard errors and adds more than 2 % of the mean within the run.",
    "oneDNN keeps the matrix products of each new number of rows, 1,024 of them unless told otherwise: gigabytes for "
    f"many lengths. The server ran with ONEDNN_PRIMITIVE_CACHE_CAPACITY={served.ONEDNN_CACHE}, so that a slope is not "
    "that cache's.",
    "No answer was a 5xx, refusals of dlm_ options stayed below 100 kB, good requests were answered as "
    "before between hostile ones, and after every wave nothing ran, waited or held memory.",
]


def made(work: served.Work, settings: dict, name: str) -> report.Report:
    rows = []
    for found in memory.growth(work.samples):
        # (requests so far, MiB)
        samples = [(each.requests, each.rss_kib / 1024) for each in memory.by_process(work.samples)[found["process"]]]
        row = {"process": found["process"], "samples": samples}
        for measure in UNITS:
            own, scale = found[measure], 1024 if measure == "rss_kib" else 1
            per, error = (own[key] / scale for key in ("per_1000_requests", "standard_error"))
            row |= {f"{measure}_first": own["first"] / scale, f"{measure}_last": own["last"] / scale}
            row[f"{measure}_growth"] = f"{per:.3f} ± {error:.3f}"
        per, error, least_grows = memory.least_growth(memory.by_process(work.samples)[found["process"]])
        row["least_growth"] = f"{per / 1024:.3f} ± {error / 1024:.3f}"
        growing = [measure for measure in memory.MEASURES if found[measure]["grows"]]
        row["grows"] = ", ".join([*growing, *["least"] * least_grows]) or "no"
        rows.append(row)
    amount = f"{work.requests} requests, {int(work.steps)} denoising steps"
    title = f"A server with hostile clients, {settings['dtype']}: {amount}"
    return report.Report(name, title, settings, COLUMNS, NOTES, rows)


def plot(figure, rows: list[dict]) -> None:
    """Resident memory of each process, relative to where the warm-up ended: absolute values lie far apart."""
    axes = figure.subplots()
    for row in rows:
        warm = int(len(row["samples"]) * memory.WARM_UP)
        base = row["rss_kib_first"]
        requests, mib = zip(*row["samples"], strict=True)
        label = f"{row['process']} ({base:.0f} MiB)"
        axes.plot(requests, [value - base for value in mib], lw=1.2, label=label)
    axes.axvline(requests[warm], color="0.7", lw=1, ls=":")
    axes.set_xlabel("requests")
    axes.set_ylabel("resident memory, MiB more than after the warm-up")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), title="process (after warm-up)")
