"""A run: what it does if parts fail, are missing or take too long. Parts are made up."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from benchmarks.lib import device, process, runner, suite
from benchmarks.lib.bounds import Peaks
from benchmarks.lib.process import Event, events, one_line, received
from benchmarks.lib.suite import Cell, Part, Plan
from benchmarks.suites import correctness

CPU = {"name": "CPU", "measured": {"read_bytes_per_s": 1e10, "copy_bytes_per_s": 1e10, "flops_per_s": 1e12}}


def options(*words):
    found = suite.parser().parse_args(["correctness", "--toy", *words])
    found.peaks = Peaks(1e10, 1e12)
    return found


def rows(folder: Path, table: str) -> dict[str, dict]:
    return {row["cell"]: row for row in json.loads((folder / f"{table}.json").read_text())["rows"]}


class Clock:
    now = 0.0


@pytest.fixture
def made_up(monkeypatch):
    """Parts whose cells take as long as estimated and give rows of their names; -> (clock, cells begun)."""
    clock, begun = Clock(), []

    def happen(part, options, seconds):
        clock.now += 60 * part.start
        begun.append(f"start {part.name}")
        for cell in part.cells:
            begun.append(cell.name)
            yield Event(cell.name)
            clock.now += 60 * cell.minutes
            if cell.work == "fails":
                yield Event(cell.name, failed="MemoryError: too much")
                return
            row = {"kind": "kernel", "what": cell.name, "by": "it", "cases": 1, "right": 1, "error": 0.5}
            yield Event(cell.name, row)

    monkeypatch.setattr(runner, "events", happen)
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock.now)
    return clock, begun


def part(name: str, *cells: tuple[str, float, str]) -> Part:
    return Part("correctness", "correctness", name, tuple(Cell(*cell) for cell in cells), 1.0)


def run(parts: list[Part], folder: Path, *words: str) -> dict[str, dict]:
    plan = Plan(parts, correctness.tables())
    runner.Run(plan, options("--results", str(folder), *words), CPU).run()
    return rows(folder, "correctness")


def test_a_cell_that_fails_costs_itself_alone(made_up, tmp_path, capsys):
    found = run([part("one", ("a", 1, ""), ("b", 1, "fails"), ("c", 1, "")), part("two", ("d", 1, ""))], tmp_path)
    assert made_up[1] == ["start one", "a", "b", "start one", "c", "start two", "d"]  # c has an engine of its own
    assert [name for name, row in found.items() if "failed" not in row] == ["a", "c", "d"]
    text = (tmp_path / "correctness.md").read_text()
    assert "b: MemoryError: too much" in text and "Bar: 3 of 3 cases" in text
    assert (tmp_path / "correctness.png").exists()
    assert "failed: b" in capsys.readouterr().out


def test_nothing_begins_that_would_take_too_long(made_up, tmp_path, capsys):
    parts = [
        part("one", ("a", 2, ""), ("b", 9, "")),
        part("two", ("c", 8, "")),
        part("three", ("d", 3, ""), ("e", 1, "")),
    ]
    found = run(parts, tmp_path, "--minutes", "9")
    # 3 minutes for a; neither b nor c fits into the 6 that are left, d does, and then not e with an engine of its own
    assert list(found) == ["a", "d", "e"] and made_up[0].now == 60 * 8
    said = capsys.readouterr().out
    assert "no minutes left for correctness: one: b" in said and "no minutes left for correctness: two: c" in said
    assert "2 cells are not measured" in said
    assert "2 cells are missing" in (tmp_path / "correctness.md").read_text()


def test_resuming_keeps_rows_and_tries_failures_again(made_up, tmp_path):
    parts = [part("one", ("a", 1, ""), ("b", 1, "fails")), part("two", ("c", 1, ""))]
    run(parts, tmp_path, "--minutes", "3.5")
    made_up[1].clear()
    mended = [part("one", ("a", 1, ""), ("b", 1, "")), parts[1]]
    found = run(mended, tmp_path, "--resume")
    assert made_up[1] == ["start one", "b", "start two", "c"] and set(found) == {"a", "b", "c"}
    made_up[1].clear()
    run(mended, tmp_path)
    assert made_up[1] == ["start one", "a", "b", "start two", "c"]


class Dead:
    exitcode = -11

    def join(self): ...


def test_what_a_process_sent_before_it_died_is_kept():
    ours, theirs = multiprocessing.Pipe(duplex=False)
    sent = [Event("a"), Event("a", {"x": 1}), Event("b")]
    for event in sent:
        theirs.send(event)
    theirs.close()
    assert list(received(ours, Dead(), None)) == [*sent, Event("b", failed="its process ended with -11")]


def test_a_process_that_takes_too_long_is_waited_for_no_longer(capsys):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.send(Event("a"))
    assert list(received(ours, Dead(), 0.01)) == [Event("a")]
    assert "no minutes left" in capsys.readouterr().out


def test_a_process_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(process, "SILENCE", 0.01)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.send(Event("a"))
    (_, failed) = received(ours, Dead(), None)
    assert failed.cell == "a" and "no sign of life" in failed.failed


def test_failures_are_a_line_without_folders():
    assert one_line(ValueError("no\n file /some/where/else/model.bin here")) == "ValueError: no file model.bin here"
    assert one_line(KeyError()) == "KeyError"


def kernel(name: str) -> Part:
    cells = (Cell(f"kernel {name}", 0.1, correctness.Kernel(name)),)
    return Part("correctness", "correctness", "kernels", cells, 0.1, vllm=False)


def test_a_kernel_without_cases_is_a_row_that_says_so():
    (_, failed) = events(kernel("new"), options("--in-process"), None)
    assert failed.cell == "kernel new" and "has no cases of new" in failed.failed


def test_a_part_has_a_process_of_its_own():
    begin, measured = events(kernel("top_pages"), options("--threads", "1"), None)
    assert begin == Event("kernel top_pages") and measured.row["right"] == measured.row["cases"] == 6


def test_toy_results_do_not_come_among_the_figures():
    with pytest.raises(SystemExit, match=r"--toy.*--results"):
        runner.run(options())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path):
    found = suite.parser().parse_args(["correctness", "--device", "cuda", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no CUDA device"):
        runner.run(found)


def test_only_speed_and_pages_take_a_checkpoint(tmp_path):
    found = suite.parser().parse_args(["quality", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="--model: quality"):
        runner.run(found)


# -- the device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, bandwidth",
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 2.04e12),
        ("NVIDIA L40S", 0.864e12),
        ("NVIDIA GH200 480GB", 4.0e12),
    ],
)
def test_datasheets_are_those_of_the_device(name, bandwidth):
    assert device.datasheet(name)[0] == bandwidth
    measured = {"read_bytes_per_s": 1.0, "copy_bytes_per_s": 2.0, "flops_per_s": 3.0}
    sheet = {"bytes_per_s": bandwidth, "flops_per_s": 9.0}
    assert device.peaks({"measured": measured, "datasheet": sheet}) == (bandwidth, 9.0)
    assert device.datasheet("another") is None and device.peaks({"measured": measured}) == (2.0, 3.0)


def test_calls_are_counted_by_cudas_names():
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch", "aten::mm", "kernel"]
    names += ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaMemcpy", "cudaEventSynchronize", "cudaStreamWaitEvent"]
    assert device.counted_calls(names) == {"launches": 3, "graph_launches": 1, "copies": 1, "waits": 3}
