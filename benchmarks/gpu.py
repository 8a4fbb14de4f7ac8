"""All that can be told of a GPU in one run: what is right, and what kernels, denoising and page-sparse decoding reach.

Four tables, the most telling cells first, each written as soon as it has a new
row. What fails, or needs what is not installed, is a row that says so; the rest
goes on. The same command with --resume goes on where it was stopped.
"""

import importlib.util
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks import gpu_device, gpu_plan, load, report
from benchmarks.gpu_parts import TABLES, Cell, Part, events, module_of
from benchmarks.gpu_shapes import SHAPES

COMPILING = {"default": "vLLM's default", "graphs": "graphs", "eager": "eager"}


def add_arguments(parser) -> None:
    parser.add_argument("--minutes", type=float, help="begin no cell that would take longer, and end with them")
    parser.add_argument("--plan", action="store_true", help="say what there is to do and how long it takes, no more")
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="parts or cells with it in their names; repeatable"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the result files have, but for failures")
    parser.add_argument(
        "--compiling", choices=COMPILING, default="default",
        help="of page-sparse decoding, both methods: as vLLM does; CUDA graphs alone; neither",
    )  # fmt: skip
    parser.add_argument("--in-process", action="store_true", help="all in this process, where one crash ends the run")
    parser.add_argument("--toy", action="store_true", help="try the run on toy models on a CPU; needs --results")
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    if args.toy and args.results == report.RESULTS:
        raise SystemExit("--toy: name a folder for its results with --results; they are not figures")
    everything = gpu_plan.toy() if args.toy else gpu_plan.plan(COMPILING[args.compiling])
    parts = chosen(everything, args.only)
    if args.plan:
        for part in parts:
            print(f"{part.minutes:6.1f} min  {label(part)}, {len(part.cells)} cells: {named(part.cells)}")
        print(f"{sum(part.minutes for part in parts):6.1f} min in all, on an H100")
        return
    here = gpu_device.device()
    if here.type != "cuda" and not args.toy:
        raise SystemExit("torch finds no CUDA device here; --toy tries the run on a CPU")
    Run(parts, shapes_of(everything), args, described(0.1 if args.toy else 1.0, args.in_process)).run()


def described(seconds: float, in_process: bool) -> dict:
    """The device, from another process: what this one holds of it, no engine could have."""
    if in_process:
        return gpu_device.describe(seconds)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(gpu_device.describe, seconds).result()


def chosen(parts: list[Part], only: list[str] | None) -> list[Part]:
    """The parts with one of the words in their labels, and of others the cells."""
    if not only:
        return parts

    def wanted(text: str) -> bool:
        return any(word in text for word in only)

    parts = [p if wanted(label(p)) else replace(p, cells=tuple(c for c in p.cells if wanted(c.name))) for p in parts]
    return [part for part in parts if part.cells]


def label(part: Part) -> str:
    return f"{part.table}: {part.name}"


def named(cells: tuple[Cell, ...], most: int = 8) -> str:
    return ", ".join(cell.name for cell in cells[:most]) + (", …" if len(cells) > most else "")


class Run:
    def __init__(self, parts: list[Part], shapes: dict[str, dict], args, device: dict):
        self.parts, self.shapes, self.args, self.device = parts, shapes, args, device
        self.peaks = gpu_device.peaks(device)
        self.load = load.Load()
        self.begin = time.monotonic()
        self.rows: dict[str, dict[str, dict]] = {table: {} for table in TABLES}
        self.earlier: dict[str, dict] = {}
        if args.resume:
            for table in TABLES:
                self.read(table)

    def read(self, table: str) -> None:
        old = report.resumed(self.path(table), self.settings(table), 1, busy=True)
        if old:
            self.rows[table] = {row["cell"]: row for row in old["rows"] if "failed" not in row}
            self.earlier[table] = old["settings"]["load"]

    def path(self, table: str) -> Path:
        return self.args.results / f"gpu-{table}-{self.device['name'].lower().replace(' ', '-')}.json"

    def left(self) -> float:
        """Minutes."""
        return (self.args.minutes or float("inf")) - (time.monotonic() - self.begin) / 60

    def run(self) -> None:
        try:
            for part in self.parts:
                self.measure(part)
        finally:  # whoever interrupts it gets the pictures of what there is
            for table, rows in self.rows.items():
                if rows:
                    self.finish(table)
        missing = sum(len(self.missing(part)) for part in self.parts)
        open_ = f"{missing} cells are not measured, the same command with --resume goes on"
        print(f"{(time.monotonic() - self.begin) / 60:.0f} minutes; {open_ if missing else 'all is measured'}")
        if failed := [name for rows in self.rows.values() for name, row in rows.items() if "failed" in row]:
            print("failed: " + "; ".join(failed))

    def finish(self, table: str) -> None:
        found, plot = self.table(table), module_of(table).plot
        print("\n".join(["", found.title, *(note for note in found.notes if note.startswith("Bar"))]))
        if importlib.util.find_spec("matplotlib") is None:
            print("without a picture: there is no matplotlib here; `python -m benchmarks redraw` makes it elsewhere")
            plot = None
        print("\n".join(map(str, found.write(self.args.results, plot))))

    def missing(self, part: Part) -> tuple[Cell, ...]:
        known = {name for name, row in self.rows[part.table].items() if "failed" not in row}
        return tuple(cell for cell in part.cells if cell.name not in known)

    def measure(self, part: Part) -> None:
        """A cell that fails takes its engine with it: those after it get a new one."""
        cells = self.missing(part)
        while cells:
            fitting = replace(part, cells=cells).fitting(self.left())
            if not fitting:
                print(f"no minutes left for {label(part)}: {named(cells)}", flush=True)
                return
            blamed = self.follow(replace(part, cells=fitting))
            names = [cell.name for cell in cells]
            if blamed is not None and blamed not in names:
                return
            cells = cells[names.index(blamed) + 1 if blamed else len(fitting) :]

    def follow(self, part: Part) -> str | None:
        """Keeps what the part gives -> the cell, or the part, that failed."""
        print(f"\n== {label(part)}, about {part.minutes:.1f} minutes", flush=True)
        seconds = None if self.args.minutes is None else max(0.0, 60 * self.left())
        self.rows[part.table].pop(part.name, None)
        with self.load.watch():
            for event in events(part, self.peaks, seconds, self.args.in_process):
                if event.failed:
                    blamed = event.cell or part.name
                    self.keep(part, blamed, {"failed": f"{blamed}: {event.failed}"})
                    return blamed
                if event.row is not None:
                    self.keep(part, event.cell, event.row)
        return None

    def keep(self, part: Part, name: str, row: dict) -> None:
        self.rows[part.table][name] = {"cell": name} | row
        shown = {
            k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if not isinstance(v, dict | list)
        }
        print(f"{name}: {shown}", flush=True)
        self.table(part.table).write(self.args.results)

    def settings(self, table: str) -> dict:
        """What rows must share to stand in one table."""
        module = module_of(table)
        shapes = {"shapes": self.shapes[table]} if table in self.shapes else {}
        how = {"page_sparse_engines": COMPILING[self.args.compiling]} if table == "pages" and not self.args.toy else {}
        return shapes | module.SETTINGS | how | {"device": self.device["name"]}

    def table(self, table: str) -> report.Report:
        module, name = module_of(table), self.device["name"]
        rows = module.finished([dict(row) for row in self.rows[table].values()])
        return report.Report(
            self.path(table).stem, f"{module.TITLE} on {name}",
            self.settings(table) | report.surroundings(1, self.load, self.earlier.get(table))
            | {"peaks": {key: value for key, value in self.device.items() if key != "name"}},
            module.COLUMNS, [*module.bars(rows), *module.NOTES, self.peaks_note()], rows,
        )  # fmt: skip

    def peaks_note(self) -> str:
        here, sheet = self.device["measured"], self.device.get("datasheet")
        reached = (
            f"reading {speed(here['read_bytes_per_s'], 'B/s')}, copying {speed(here['copy_bytes_per_s'], 'B/s')}, "
            f"bfloat16 products {speed(here['flops_per_s'], 'FLOP/s')}"
        )
        if not sheet:
            return f"Bounds are at what is reached here: {reached}."
        stated = f"{speed(sheet['bytes_per_s'], 'B/s')} and {speed(sheet['flops_per_s'], 'FLOP/s')}"
        return f"Bounds are at the datasheet's {stated}; reached here: {reached}."


def speed(per_second: float, unit: str) -> str:
    scale, letter = (1e12, "T") if per_second >= 1e12 else (1e9, "G")
    return f"{per_second / scale:.3g} {letter}{unit}"


def shapes_of(parts: list[Part]) -> dict[str, dict]:
    """table -> the shapes of all engines it may have, whatever this run leaves out"""
    found: dict[str, dict] = {}
    for part in parts:
        if part.engine:
            found.setdefault(part.table, {})[part.engine.shape] = SHAPES[part.engine.shape].describe()
    return found
