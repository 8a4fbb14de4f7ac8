"""Tables, plots and the pages that quote them once more, from their JSON: after a change of columns, notes, drawing."""

import importlib
from pathlib import Path

from benchmarks import quoted, report

#: what a result's name begins with -> who wrote it
WRITERS = {
    "speed": "benchmarks.speed", "kernels": "benchmarks.kernels", "decode": "benchmarks.decode",
    "costs": "benchmarks.costs", "selection": "benchmarks.selection", "quality": "benchmarks.quality",
    "speed-rules": "benchmarks.speed_rules", "speed-blocks": "benchmarks.speed_blocks",
    "quality-rules": "benchmarks.quality_rules", "quality-walks": "benchmarks.quality_walks",
    "view": "benchmarks.view",
    "soak": "tests.soak.process_table", "soak-server": "tests.soak.server_table",
    "soak-hostile": "tests.soak.hostile.table",
    "gpu-correctness": "benchmarks.gpu_correctness", "gpu-kernels": "benchmarks.gpu_kernels",
    "gpu-denoising": "benchmarks.gpu_denoising", "gpu-pages": "benchmarks.gpu_pages",
    "gpu-rules": "benchmarks.gpu_rules",
    "recovery": "examples.training.recovery", "training-memory": "examples.training.memory",
}  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("names", nargs="*", help="of results; default: all that there are")
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    for written in again(args.results, args.names):
        print(written)
    if args.results == report.RESULTS:
        for page, text in quoted.rewritten(args.results).items():
            page.write_text(text)


def again(results: Path, names: list[str]) -> list[Path]:
    """Of these names; none: of all."""
    written = []
    for path in sorted(results.glob("*.json")):
        if (not names or path.stem in names) and (writer := writer_of(path.stem)):
            written += report.Report.read(path, writer.COLUMNS).write(results, getattr(writer, "plot", None))
    return written


def writer_of(name: str):
    fitting = [start for start in WRITERS if name.startswith(start)]
    return importlib.import_module(WRITERS[max(fitting, key=len)]) if fitting else None
