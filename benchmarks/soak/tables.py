"""What the long runs write: tables of what was done and checked, and the server's memory over its requests."""

from collections import Counter
from pathlib import Path

from benchmarks import report
from benchmarks.soak import memory, served
from vllm_dlm.methods import methods

PROCESS_COLUMNS = [
    report.Column("checkpoint", "checkpoint"),
    report.Column("options", "server options", lambda value: f"`{value}`"),
    report.Column("requests", "requests"),
    report.Column("batches", "batches"),
    report.Column("compared", "compared with alone", "{}"),
    report.Column("aborted", "aborted"),
    report.Column("restarted", "restarted"),
    report.Column("refused", "drawn but refused"),
    report.Column("steps", "engine steps"),
    report.Column("seconds", "s", "{:.0f}"),
]

PROCESS_NOTES = [
    "Every request was served in a batch of up to 24 that arrive, leave and are thrown back by cache resets at random "
    "steps, with memory for one to a few canvases, filled with NaN before each batch.",
    "compared: answers (tokens, reason of the end, tokens of the log-probabilities) equal to those of the same request alone "
    "in an engine of its own with ample memory and another block size. About a third of the requests of a batch are new, the "
    "others were asked before, in other company. Not compared: aborted ones, and those restarted by a reset under a policy "
    "that caches, which may answer otherwise.",
    "After every batch: all blocks free, nothing left in scheduler, runner and front-end, counters equal to what was delivered.",
    "drawn but refused: by the front-end, with an error that names the field.",
]

SERVER_NOTES = [
    "Every process of the server while it is idle, after each wave of clients. Growth: slope of a line through the means of "
    f"{memory.STRETCHES} stretches of the samples after the first {memory.WARM_UP:.0%}, ± its standard error.",
    "grows: the slope is above three standard errors and adds more than 2 % of the mean within the run.",
    "oneDNN keeps the matrix products of each new number of rows, 1,024 of them unless told otherwise: gigabytes for many "
    f"lengths. The server ran with ONEDNN_PRIMITIVE_CACHE_CAPACITY={served.ONEDNN_CACHE}, so that a slope is not that cache's.",
    "No answer was a 5xx, refusals of dlm_ options stayed below 100 kB, good requests were answered as before between hostile ones, and after "
    "every wave nothing ran, waited or held memory.",
]


def process_report(done: list, settings: dict, name: str) -> report.Report:
    rows = [
        {
            "checkpoint": shift.server.label, "options": str(shift.server.dlm), "requests": shift.requests,
            "batches": shift.batches, "compared": shift.compared, "aborted": shift.aborted, "restarted": shift.restarted,
            "refused": sum(shift.refused.values()), "steps": shift.steps, "seconds": shift.seconds,
        }
        for shift in done
    ]  # fmt: skip
    covered = sum((shift.covered for shift in done), Counter())
    possible = 1
    for kind in ("decoding", "reuse", "selection"):
        possible *= len(methods(kind))
    totals = {
        key: sum(row[key] for row in rows)
        for key in ("requests", "compared", "aborted", "restarted", "refused", "steps")
    }
    settings |= {
        "in_all": totals, "combinations_of_decoding_reuse_selection": f"{len(covered)} of {possible}",
        "refused_by_field": dict(sum((shift.refused for shift in done), Counter()).most_common()),
    }  # fmt: skip
    title = f"Random batches in process, {settings['dtype']}: {totals['requests']} requests"
    return report.Report(name, title, settings, PROCESS_COLUMNS, PROCESS_NOTES, rows)


def server_report(work: served.Work, settings: dict, name: str) -> report.Report:
    columns = [report.Column("process", "process"), report.Column("samples", "samples")]
    for measure, unit in (("rss_kib", "MiB"), ("threads", "threads"), ("descriptors", "descriptors")):
        columns += [
            report.Column(f"{measure}_first", f"{unit} after warm-up", "{:.1f}"),
            report.Column(f"{measure}_last", f"{unit} at the end", "{:.1f}"),
            report.Column(f"{measure}_growth", f"{unit} per 1,000 requests"),
        ]
    columns.append(report.Column("grows", "grows"))
    rows = []
    for found in memory.growth(work.samples):
        row = {"process": found["process"], "samples": found["samples"]}
        for measure, scale in (("rss_kib", 1024), ("threads", 1), ("descriptors", 1)):
            own = found[measure]
            per, error = (own[key] / scale for key in ("per_1000_requests", "standard_error"))
            row |= {f"{measure}_first": own["first"] / scale, f"{measure}_last": own["last"] / scale}
            row[f"{measure}_growth"] = f"{per:.3f} ± {error:.3f}"
        row["grows"] = ", ".join(measure for measure in memory.MEASURES if found[measure]["grows"]) or "no"
        rows.append(row)
    title = f"A server with hostile clients, {settings['dtype']}: {work.requests} requests, {int(work.steps)} denoising steps"
    return report.Report(name, title, settings, columns, SERVER_NOTES, rows)


def plot(samples: list[memory.Sample]):
    """Resident memory of each process, relative to where the warm-up ended: absolute values lie far apart."""

    def draw(figure, _) -> None:
        axes = figure.subplots()
        for process, own in memory.by_process(samples).items():
            base = own[int(len(own) * memory.WARM_UP)].rss_kib
            label = f"{process} ({base / 1024:.0f} MiB)"
            axes.plot(
                [s.requests for s in own], [(s.rss_kib - base) / 1024 for s in own], lw=1.2, label=label
            )
        axes.axvline(own[int(len(own) * memory.WARM_UP)].requests, color="0.7", lw=1, ls=":")
        axes.set_xlabel("requests")
        axes.set_ylabel("resident memory, MiB more than after the warm-up")
        axes.legend(
            frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), title="process (after warm-up)"
        )

    return draw


def write(made: report.Report, folder: Path | None, draw=None) -> None:
    made.print()
    for path in made.write(folder or report.RESULTS, draw):
        print(path.name)
