"""The report of a run of the hostile table: a row each, and whether every bar was met."""

from collections import Counter
from statistics import median

from benchmarks.lib import report
from tests.soak.hostile import run as hostile
from tests.soak.hostile.good import GOOD
from tests.soak.hostile.life import RowResult

COLUMNS = [
    report.Column("kind", "kind"),
    report.Column("name", "requests"),
    report.Column("clients", "concurrent"),
    report.Column("kib", "KiB each", "{:,.0f}"),
    report.Column("expected", "expected"),
    report.Column("answers", "answered"),
    report.Column("health_ms", "worst `/health`, ms", "{:.0f}"),
    report.Column("late_ms", "prober woken late, ms", "{:.0f}"),
    report.Column("waited_ms", "front-end without a core, ms", "{:.0f}"),
    report.Column("step_ms", "longest step, ms", "{:.0f}"),
    report.Column("step_own_ms", "without waiting for a core, ms", "{:.0f}"),
    report.Column("front_end_mib", "front-end, MiB", "{:.0f}"),
    report.Column("engine_mib", "engine, MiB", "{:.0f}"),
    report.Column("problem", "problem"),
]

NOTES = [
    "`/health` is asked every 20 ms on a new connection by a process of its own; the worst answer that overlaps the "
    "row's requests counts. prober woken late: how much later than it wanted that process ran, which the machine's "
    "scheduler adds and no server can change. front-end without a core: how long its main thread was ready to run "
    "during the row and other processes had the cores.",
    "Control rows contain no field of this package and meet no bar for `/health`. They show what vLLM itself takes "
    f"for a body of that shape and size. Another row may take {hostile.ABOVE_CONTROL} times as long as the control row "
    "of its shape where that is more than the bar.",
    "Steps are those of the engine's thread, timed around EngineCoreProc._process_engine_step; work between two steps "
    "is the arrival of a request. without waiting for a core: less the time in which that thread was ready to run "
    "and other processes had the cores. The bar holds for this one: on an idle machine both are the same.",
    "Memory in the rows is resident memory directly after the row. The bar compares memory before and after the table, "
    "both idle, after garbage collection and malloc_trim. Before it: the good clients, legal requests of all sizes, "
    "and bodies as large as the largest hostile one without a field of this package.",
    "answered: status x requests; left: the client hung up, or its time was over. 200 with an error in the stream "
    "counts as the status of the error.",
]


def made(work: hostile.Work, settings: dict, name: str) -> report.Report:
    rows = [row_of(result) for result in work.results]
    bars = missed(work)
    settings = settings | {
        "rows": len(rows),
        "requests": sum(r.answers.total() for r in work.results),
        "seconds": round(work.seconds),
        "server": work.server_arguments,
        "good_clients": GOOD,
        "baseline_without_attack": work.baseline,
        "worst_health": worst_health(work),
        "steps": steps(work),
        "memory_mib": memory_of(work),
        "memory_mib_after_each_kind": work.memory_by_kind,
        "good_answers": work.good,
        "changed_answers": len(work.changed),
        "servers_started": len(work.memory),
        "races_with_one_request_id": work.races,
        "races_with_a_problem": len(work.race_problems),
        "statuses": {
            str(status or "left"): count
            for status, count in sorted(
                sum((result.answers for result in work.results), Counter()).items(), key=lambda item: item[0] or 0
            )
        },
        "bars": {"health_ms": hostile.HEALTH_MS, "memory_mib": hostile.MEMORY_MIB, "step_ratio": hostile.STEP_RATIO},
        "bars_missed": bars or "none",
    }
    title = f"Hostile requests, {settings['dtype']}: {len(rows)} rows, {len(bars) or 'no'} bars missed"
    return report.Report(name, title, settings, COLUMNS, NOTES, rows)


def row_of(result: RowResult) -> dict:
    row = result.row
    mib = {process.split(" ")[0]: round(value, 1) for process, value in result.mib.items()}
    answers = sorted(result.answers.items(), key=lambda item: item[0] or 0)
    return {
        "kind": row.kind,
        "name": row.name,
        "clients": row.clients,
        "kib": round(result.size / 1024, 1),
        "like": row.like,
        "expected": expected_of(row.expected),
        "control": row.control,
        "answers": ", ".join(f"{status or 'left'} x {count}" for status, count in answers),
        "health_ms": round(result.health_ms, 1),
        "late_ms": round(result.late_ms, 1),
        "waited_ms": round(result.waited_ms, 1),
        "step_ms": round(result.step_ms, 2),
        "step_own_ms": round(result.step_own_ms, 2),
        "arrival_ms": round(result.arrival_ms, 2),
        "good_answers": result.good,
        "seconds": round(result.seconds, 2),
        "front_end_mib": mib.get("front-end"),
        "engine_mib": mib.get("engine"),
        "problem": "; ".join(result.problems)[:300] or None,
    }


def expected_of(statuses: frozenset[int]) -> str:
    return " or ".join(name for name, status in (("200", 200), ("4xx", 400), ("503", 503)) if status in statuses)


def worst_health(work: hostile.Work) -> dict:
    """The worst answer of /health under a row of each sort, and under which row"""
    found = {}
    for sort, control in (("hostile", False), ("control", True)):
        results = [result for result in work.results if result.row.control is control]
        if results:
            worst = max(results, key=lambda result: result.health_ms)
            found[sort] = {"ms": round(worst.health_ms, 1), "row": f"{worst.row.kind}: {worst.row.name}"}
    return found


def steps(work: hostile.Work) -> dict:
    if not work.steps:
        return {}
    longest = max(work.steps, key=lambda span: span.own)
    usual = median(span.own for span in work.steps)
    return {
        "count": len(work.steps),
        "ms_median": round(1e3 * usual, 2),
        "ms_longest": round(1e3 * longest.own, 2),
        "longest_in_all_ms": round(1e3 * max(span.seconds for span in work.steps), 2),
        "longest_rows": int(longest.rows),
        "rows_median": median(span.rows for span in work.steps),
        "longest_to_median": round(longest.own / usual, 1),
        "ms_longest_arrival": round(1e3 * max((span.own for span in work.arrivals), default=0), 2),
    }


def memory_of(work: hostile.Work) -> list[dict]:
    """Resident memory per process, for each server that was started"""
    return [
        {
            process: {"before": round(before, 1), "after": None if after is None else round(after, 1)}
            for process, (before, after) in own.items()
        }
        for own in work.memory
    ]


def missed(work: hostile.Work) -> list[str]:
    """Every bar that was missed, with the row"""
    found = list(work.problems)
    step_bar = hostile.STEP_RATIO * (median(span.own for span in work.steps) if work.steps else 0) * 1e3
    for result in work.results:
        where = f"{result.row.kind}: {result.row.name}"
        found += [f"{where}: {problem}"[:300] for problem in result.problems]
        if result.row.control:
            continue
        if result.health_ms > (bar := health_bar(work, result.row.like)):
            found.append(f"{where}: /health took {result.health_ms:.0f} ms, the bar is {bar:.0f}")
        for what, milliseconds in (("a step", result.step_own_ms), ("the arrival of a request", result.arrival_ms)):
            if work.steps and milliseconds > step_bar:
                found.append(f"{where}: {what} took {milliseconds:.0f} ms, the bar is {step_bar:.0f}")
    for own in work.memory:
        for process, (before, after) in own.items():
            if after is None:
                found.append(f"{process}: the server ended, so its memory afterwards is not known")
            elif after - before > hostile.MEMORY_MIB:
                found.append(f"{process}: {after - before:.0f} MiB more than before, the bar is {hostile.MEMORY_MIB}")
    if work.changed:
        found.append(f"{len(work.changed)} good answers changed, such as {work.changed[0]}"[:300])
    found += work.race_problems[:5]
    return found


def health_bar(work: hostile.Work, like: str) -> float:
    """Milliseconds: the bar, or more where vLLM itself exceeds it with a body of that shape"""
    controls = [result.health_ms for result in work.results if result.row.control and like and result.row.like == like]
    return max([hostile.HEALTH_MS, *(hostile.ABOVE_CONTROL * each for each in controls)])


def plot(figure, rows: list[dict]) -> None:
    """Worst /health of each row in the order of the table, and resident memory after it"""
    above, below = figure.subplots(2, sharex=True)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for kind in kinds:
        at = [index for index, row in enumerate(rows) if row["kind"] == kind]
        above.plot(at, [rows[index]["health_ms"] for index in at], "o", ms=3, label=kind)
    above.axhline(hostile.HEALTH_MS, color="0.4", lw=1, ls="--")
    above.set_yscale("log")
    above.set_ylabel("worst /health, ms")
    above.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for key, label in (("front_end_mib", "front-end"), ("engine_mib", "engine")):
        own = [(index, row[key]) for index, row in enumerate(rows) if row[key] is not None]
        if own:
            below.plot(*zip(*own, strict=True), lw=1.2, label=label)
    below.set_ylabel("resident memory, MiB")
    below.set_xlabel("row of the table")
    below.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
