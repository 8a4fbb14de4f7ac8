"""The table of a run in process: what each pair of engines was asked, and what was compared."""

from collections import Counter

from benchmarks.lib import report
from vllm_dlm.methods import methods

COLUMNS = [
    report.Column("checkpoint", "checkpoint"),
    report.Column("options", "server options", lambda value: f"`{value}`"),
    report.Column("requests", "requests"),
    report.Column("batches", "batches"),
    report.Column("compared", "compared with alone", "{}"),
    report.Column("aborted", "aborted"),
    report.Column("restarted", "restarted"),
    report.Column("refused", "drawn but refused"),
    report.Column("steps", "engine steps"),
]

NOTES = [
    "Every request was served in a batch of up to 24 that arrive, leave and are thrown back by cache resets at random "
    "steps, with memory for one to a few canvases, filled with NaN before each batch.",
    "compared: answers (tokens, reason of the end, tokens of the log-probabilities) equal to those of the same request "
    "alone in an engine of its own with ample memory and another block size. About a third of the requests of a batch "
    "are new, the others were asked before, in other company. Not compared: aborted ones, and those restarted by a "
    "reset under a policy that caches, which may answer otherwise.",
    "After every batch: all blocks free, nothing left in scheduler, runner and front-end, counters equal to what was "
    "delivered.",
    "drawn but refused: by the front-end, with an error that names the field.",
]


def made(done: list, settings: dict, name: str) -> report.Report:
    rows = [
        {
            "checkpoint": shift.server.label,
            "options": str(shift.server.dlm),
            "requests": shift.requests,
            "batches": shift.batches,
            "compared": shift.compared,
            "aborted": shift.aborted,
            "restarted": shift.restarted,
            "refused": sum(shift.refused.values()),
            "steps": shift.steps,
            "seconds": shift.seconds,
        }
        for shift in done
    ]
    covered = sum((shift.covered for shift in done), Counter())
    possible = 1
    for kind in ("decoding", "reuse", "selection"):
        possible *= len(methods(kind))
    totals = {
        key: sum(row[key] for row in rows)
        for key in ("requests", "compared", "aborted", "restarted", "refused", "steps")
    }
    settings |= {
        "in_all": totals,
        "combinations_of_decoding_reuse_selection": f"{len(covered)} of {possible}",
        "refused_by_field": dict(sum((shift.refused for shift in done), Counter()).most_common()),
    }
    title = f"Random batches in process, {settings['dtype']}: {totals['requests']} requests"
    return report.Report(name, title, settings, COLUMNS, NOTES, rows)
