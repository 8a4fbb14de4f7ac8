"""Tables, plots and the pages that quote them again, from their JSON: after a change of columns or drawing."""

import importlib
from collections.abc import Callable
from pathlib import Path

from benchmarks.lib import quoted, report
from benchmarks.lib.report import Column
from benchmarks.lib.suite import SUITES, module_of

#: tables that other packages write: beginning of the name -> module with COLUMNS and perhaps `plot`
OTHERS = {
    "soak": "tests.soak.process_table",
    "soak-server": "tests.soak.server_table",
    "soak-hostile": "tests.soak.hostile.table",
    "recovery": "examples.training.recovery",
}


def redraw(results: Path, names: list[str]) -> None:
    for path in sorted(results.glob("*.json")):
        if (not names or path.stem in names) and (writer := writer_of(path.stem)):
            for written in report.Report.read(path, writer[0]).write(results, writer[1]):
                print(written)
    if results == report.RESULTS:
        redraw_pages()


def redraw_pages() -> None:
    for page, text in quoted.rewritten(report.RESULTS).items():
        page.write_text(text)


def writer_of(name: str) -> tuple[list[Column], Callable | None] | None:
    """Columns and plot of a result: those of the table whose name is its longest beginning"""
    known = {stem: module_of(suite).tables()[stem] for suite in SUITES for stem in module_of(suite).tables()}
    fitting = [start for start in (*known, *OTHERS) if name.startswith(start)]
    if not fitting:
        return None
    if (start := max(fitting, key=len)) in known:
        return known[start].columns, known[start].plot
    module = importlib.import_module(OTHERS[start])
    return module.COLUMNS, getattr(module, "plot", None)
