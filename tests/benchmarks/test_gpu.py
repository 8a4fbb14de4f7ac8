"""The run on a GPU: what it does when parts fail, are missing or take too long, and all of it in small on a CPU."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import drawing, gpu, gpu_cases, gpu_device, gpu_parts, gpu_plan, report
from benchmarks.gpu_case import Case
from benchmarks.gpu_correctness import difference, error_of, outcomes
from benchmarks.gpu_denoising import summary
from benchmarks.gpu_engine import Run, Step
from benchmarks.gpu_parts import TABLES, Cell, Event, Part, events, module_of, one_line, received
from benchmarks.gpu_shapes import SHAPES, Peaks, Reading, decoding_bound, denoising_bound
from tests.labels import assert_labels_apart
from vllm_dlm.step.counts import Counts

ROOT = Path(__file__).resolve().parents[2]
H200 = Peaks(4.8e12, 989e12)


def arguments(*words) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args(words)


def rows(folder: Path, table: str) -> dict[str, dict]:
    (path,) = folder.glob(f"gpu-{table}-*.json")
    return {row["cell"]: row for row in json.loads(path.read_text())["rows"]}


# -- the plan --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [gpu_plan.plan(), gpu_plan.toy()], ids=["plan", "toy"])
def test_every_table_has_parts_and_every_cell_a_name_of_its_own(parts):
    assert {part.table for part in parts} == set(TABLES)
    names = [(part.table, cell.name) for part in parts for cell in part.cells]
    assert len(names) == len(set(names))
    assert all(cell.minutes > 0 and part.start > 0 for part in parts for cell in part.cells)


def test_what_bars_are_about_comes_first():
    parts = gpu_plan.plan()
    assert parts[0].name == "kernels" and parts[1].cells[0].name == "32768 x8"
    llada = parts[2].cells
    assert [cell.name for cell in llada[:2]] == [f"llada-8b fast_dllm/dual 1024 x{n}" for n in (1, 32)]
    first_of_pages = next(part for part in parts if part.table == "pages")
    assert first_of_pages.cells[0].name == "llama-3-8b unique 131072 x1"
    # all prompts, requests and policies of both families in the end
    denoised = {
        (part.engine.shape, cell.what.policy, cell.what.prompt, cell.what.requests)
        for part in parts if part.table == "denoising" for cell in part.cells
    }  # fmt: skip
    assert len(denoised) == 2 * len(gpu_plan.POLICIES) * 3 * 4


def test_only_takes_parts_or_cells():
    parts = gpu.chosen(gpu_plan.plan(), ["recorded runs", "dual 1024 x1"])
    names = [cell.name for part in parts if part.table == "denoising" for cell in part.cells]
    assert names == [
        "llada-8b fast_dllm/dual 1024 x1", "llada-8b fast_dllm/dual 1024 x1 eager", "dream-7b fast_dllm/dual 1024 x1",
    ]  # fmt: skip
    assert len(next(part for part in parts if part.name == "recorded runs").cells) > 1


# -- what is left when parts fail ------------------------------------------------------------


class Clock:
    now = 0.0


@pytest.fixture
def made_up(monkeypatch):
    """Parts whose cells take what they are expected to and give rows of their names; -> (clock, cells begun)."""
    clock, begun = Clock(), []

    def happen(part, peaks, seconds, in_process):
        clock.now += 60 * part.start
        begun.append(f"start {part.name}")
        for cell in part.cells:
            begun.append(cell.name)
            yield Event(cell.name)
            clock.now += 60 * cell.minutes
            if cell.what == "fails":
                yield Event(cell.name, failed="MemoryError: too much")
                return
            yield Event(
                cell.name, {"kind": "kernel", "what": cell.name, "by": "it", "cases": 1, "right": 1, "error": 0.5}
            )

    monkeypatch.setattr(gpu, "events", happen)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock.now)
    return clock, begun


def part(name: str, *cells: tuple[str, float, str]) -> Part:
    return Part("correctness", name, 1.0, tuple(Cell(*cell) for cell in cells))


def run(parts: list[Part], folder: Path, *words: str) -> dict[str, dict]:
    device = {"name": "CPU", "measured": {"read_bytes_per_s": 1e10, "copy_bytes_per_s": 1e10, "flops_per_s": 1e12}}
    gpu.Run(parts, {}, arguments("--results", str(folder), *words), device).run()
    return rows(folder, "correctness")


def test_a_cell_that_fails_costs_itself_alone(made_up, tmp_path, capsys):
    found = run([part("one", ("a", 1, ""), ("b", 1, "fails"), ("c", 1, "")), part("two", ("d", 1, ""))], tmp_path)
    assert made_up[1] == ["start one", "a", "b", "start one", "c", "start two", "d"]  # c has an engine of its own
    assert [name for name, row in found.items() if "failed" not in row] == ["a", "c", "d"]
    text = (tmp_path / "gpu-correctness-cpu.md").read_text()
    assert "b: MemoryError: too much" in text and "Bar: 3 of 3 cases" in text
    assert (tmp_path / "gpu-correctness-cpu.png").exists()
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
    for event in (Event("a"), Event("a", {"x": 1}), Event("b")):
        theirs.send(event)
    theirs.close()
    assert list(received(ours, Dead(), None)) == [
        Event("a"), Event("a", {"x": 1}), Event("b"), Event("b", failed="its process ended with -11"),
    ]  # fmt: skip


def test_a_process_that_takes_too_long_is_waited_for_no_longer(capsys):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.send(Event("a"))
    assert list(received(ours, Dead(), 0.01)) == [Event("a")]
    assert "no minutes left" in capsys.readouterr().out


def test_a_process_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(gpu_parts, "SILENCE", 0.01)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.send(Event("a"))
    (_, failed) = received(ours, Dead(), None)
    assert failed.cell == "a" and "nothing was heard" in failed.failed


def test_failures_are_a_line_without_folders():
    assert one_line(ValueError("no\n file /some/where/else/model.bin here")) == "ValueError: no file model.bin here"
    assert one_line(KeyError()) == "KeyError"


def test_every_kernel_has_cases():
    assert set(gpu_cases.folders()) <= set(gpu_cases.CASES)


def test_a_kernel_without_cases_is_a_row_that_says_so():
    part = Part("correctness", "kernels", 0.1, (Cell("kernel new", 0.1, gpu_plan.Kernel("new")),), vllm=False)
    (_, failed) = events(part, H200, None, in_process=True)
    assert failed.cell == "kernel new" and "has no cases of new" in failed.failed


def test_without_vllm_kernels_are_measured(tmp_path):
    """From a process where importing vLLM fails."""
    code = (
        "import sys; sys.modules['vllm'] = None; sys.argv[1:] = sys.argv[1:]\n"
        "from benchmarks.__main__ import main; main()"
    )
    only = ("--only", "kernel top_pages", "--only", "toy-dream", "--only", "toy dense")
    done = subprocess.run(
        [sys.executable, "-c", code, "gpu", "--toy", "--in-process", *only, "--results", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path, "correctness")["kernel top_pages"]["right"] == 6
    for table, name in (("denoising", "toy-dream"), ("pages", "toy dense")):
        assert rows(tmp_path, table) == {name: {"cell": name, "failed": f"{name}: vLLM is not installed"}}


# -- what is told ----------------------------------------------------------------------------


def test_a_step_of_llada_is_bound_by_its_weights_until_it_has_many_rows():
    """7.5e9 weights behind the embedding, two bytes each: 3.1 ms on an H200."""
    shape = SHAPES["llada-8b"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 12288) + 4096 * 126464
    assert shape.weight_bytes() == 2 * weights and shape.weight_bytes() / H200.bytes_per_s == pytest.approx(
        3.12e-3, 1e-2
    )
    few, many = Counts(head_rows=32), Counts(head_rows=32 * 32)
    for counts, n in ((few, 32), (many, 32 * 1088)):
        counts.rows = dict.fromkeys(counts.rows, 32 * n)
        counts.keys_read = 32 * 1088
    found = denoising_bound(shape, few, H200)
    assert found.by == "bytes"
    assert found.ms == pytest.approx(1e3 * (2 * weights + 32 * 1088 * 2 * 4096 * 2) / 4.8e12)
    found = denoising_bound(shape, many, H200)
    assert found.by == "FLOPs"
    assert found.ms == pytest.approx(2e3 * ((weights - 4096 * 126464) * 32 * 1088 + 4096 * 126464 * 1024) / 989e12)


def test_decoding_with_chosen_pages_reads_their_keys_and_the_summaries_of_all():
    shape, context = SHAPES["qwen2.5-7b"], 32768
    key = 2 * 2 * 4 * 128  # bytes of a key and its value in a layer
    dense = decoding_bound(shape, context, 8, None, H200)
    assert dense.ms == pytest.approx(1e3 * (shape.weight_bytes() + 8 * 28 * context * key) / 4.8e12)
    sparse = decoding_bound(shape, context, 8, Reading(2048, 64, 26), H200)
    summaries = context // 64 * 4 * (2 * 128 + 4)
    read = 8 * (2 * context * key + 26 * (2048 * key + summaries))
    assert sparse.ms == pytest.approx(1e3 * (shape.weight_bytes() + read) / 4.8e12)


@pytest.mark.parametrize(
    "name, bandwidth",
    [("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H100 PCIe", 2.0e12), ("NVIDIA H200", 4.8e12),
     ("NVIDIA A100-SXM4-80GB", 2.04e12), ("NVIDIA L40S", 0.864e12), ("NVIDIA GH200 480GB", 4.0e12)],
)  # fmt: skip
def test_datasheets_are_those_of_the_device(name, bandwidth):
    assert gpu_device.datasheet(name)[0] == bandwidth
    measured = {"read_bytes_per_s": 1.0, "copy_bytes_per_s": 2.0, "flops_per_s": 3.0}
    sheet = {"bytes_per_s": bandwidth, "flops_per_s": 9.0}
    assert gpu_device.peaks({"measured": measured, "datasheet": sheet}) == (bandwidth, 9.0)
    assert gpu_device.datasheet("another") is None and gpu_device.peaks({"measured": measured}) == (2.0, 3.0)


def test_calls_are_counted_by_cudas_names():
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch", "aten::mm", "kernel"]
    names += ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaMemcpy", "cudaEventSynchronize", "cudaStreamWaitEvent"]
    assert gpu_device.calls(names) == {"launches": 3, "graph_launches": 1, "copies": 1, "waits": 3}


def test_numbers_of_a_row():
    """Two runs of three steps of two requests, half of the rows recomputed; the median step takes twice its bound."""
    shape = SHAPES["toy-llada"]

    def steps(*times):
        counts = Counts(head_rows=1)
        counts.rows["feed_forward"] = 2 * 2 * 80 // 2
        return [Step(counts, 2, 2, ms, ms / 2, ms / 4) for ms in times]

    peaks = Peaks(shape.weight_bytes() / 1e-3, 1e30)  # weights take a millisecond
    found = summary([Run(steps(1, 2, 8), 2.0, 6, True), Run(steps(1, 2, 3), 1.0, 6, True)], shape, peaks, 80)
    assert (found["steps"], found["at_once"], found["tokens_per_step"], found["rows_share"]) == (3, 2, 1.0, 0.5)
    assert (found["ms_per_step"], found["of_weights"], found["bound_by"]) == (2, 0.5, "bytes")
    assert found["of_bound"] == pytest.approx(0.5) and found["of_bound_all"] == pytest.approx(6 / 17)
    assert (found["forward_ms"], found["head_ms"], found["host_ms"]) == (1.0, 0.5, 0.5)
    assert (found["tokens_per_s"], found["steps_per_s"]) == (4.5, 2.25)
    nobody_called = [replace(step, forward_ms=None) for step in steps(1, 2)]
    assert "host_ms" not in summary([Run(nobody_called, 1.0, 4, True)], shape, peaks, 80)


def test_errors_are_shares_of_what_is_tolerated():
    def case(got, want, tolerance):
        return Case("", torch.tensor(got), torch.tensor(want), tolerance)

    assert error_of(case([1.0, 3.1], [1.0, 3.0], 0.1)) == pytest.approx(0.25)
    assert error_of(case([float("nan"), -torch.inf], [float("nan"), -torch.inf], 0.1)) == 0
    assert error_of(case([float("nan")], [1.0], 0.1)) == torch.inf
    assert error_of(case([1, 2], [1, 2], 0)) == 0 and error_of(case([1, 2], [1, 3], 0)) == torch.inf
    assert error_of(case([1.0], [[1.0, 1.0]], 0.1)) == torch.inf
    assert difference("x", [1, 2, 3], [1, 5, 3]) == "x: token 1 is 2 and not 5"
    assert difference("x", [1, 2], [1, 2, 3]) == "x: 2 tokens instead of 3"


def test_bars_are_told_from_their_rows():
    denoising, pages, kernels = (module_of(table) for table in ("denoising", "pages", "kernels"))
    cell = {"shape": "llada-8b", "method": "fast_dllm/dual", "prompt": 1024, "ms_per_step": 5.0, "of_weights": 0.62}
    both = denoising.finished([
        cell | {"requests": 32, "tokens_per_s": 1800.0}, cell | {"requests": 1, "tokens_per_s": 200.0},
        {"failed": "none: no"},
    ])  # fmt: skip
    assert [row.get("requests") for row in both] == [1, 32, None]
    assert [told.rpartition(": ")[2] for told in denoising.bars(both)] == ["62%.", "9.0 times."]
    cell = {"shape": "llama-3-8b", "context": 131072, "asked": 8, "requests": 3, "bound_ms": 1.0}
    both = pages.finished([
        cell | {"method": "unique", "ms_per_step": 5.0, "pages_share": 0.02},
        cell | {"method": "dense", "ms_per_step": 30.0},
    ])  # fmt: skip
    assert [row["method"] for row in both] == ["dense", "unique"] and both[1]["speedup"] == 6
    assert "6.0 (llama-3-8b, 3)" in pages.bars(both)[0] and "at least 6.00 times" in pages.bars(both)[1]
    assert (
        "13.0 times FlashAttention" in kernels.bars([{"keys": 32768, "batch": 8, "flash_ratio": 13.0, "ratio": 9.0}])[0]
    )


def full_rows(table: str) -> list[dict]:
    """Of every cell of the plan, with numbers of some width."""
    cells = [(part, cell) for part in gpu_plan.plan() if part.table == table for cell in part.cells]
    made = []
    for i, (part, cell) in enumerate(cells):
        row = {"cell": cell.name, "error": 0.001 * 3**i, "cases": 10, "right": 7 + i % 4, "agreement": 0.97}
        row |= {
            "ms_per_step": 12.34 + i,
            "of_bound": 0.4567,
            "ratio": 11.11 + i,
            "flash_ratio": 12.2,
            "bound_ratio": 14.25,
        }
        what = cell.what
        if table == "correctness":
            kind = "kernel" if part.name == "kernels" else part.name
            row |= {"kind": kind, "what": getattr(what, "name", cell.name), "by": getattr(what, "dtype", "float32")}
            if kind == "kernel":
                row.pop("agreement")
            else:
                row.pop("error")
        elif table == "kernels":
            row |= {"keys": what.keys, "batch": what.batch, "dense": {}, "dense_kernel": "x"}
        elif table == "denoising":
            row |= {"shape": part.engine.shape, "method": what.policy + (", eager" if part.engine.eager else "")}
            row |= {"prompt": what.prompt, "requests": what.requests, "tokens_per_s": 1.0, "of_weights": 0.5}
        elif table == "rules":
            own = what.method
            row |= {"method": own.label, "against": own.against, "requests": what.requests}
            row |= {"tokens_per_s": 123.4 + i, "texts": [1]}
        else:
            row |= {"shape": part.engine.shape, "method": "dense" if part.engine.selection is None else "unique"}
            row |= {"context": what.context, "asked": what.requests, "requests": what.requests, "bound_ms": 1.0}
        made.append(row)
    return [*made, {"cell": "x", "failed": "x: it failed"}]


@pytest.mark.parametrize("table", TABLES)
def test_no_label_of_a_full_plot_lies_over_another(table):
    from matplotlib import pyplot

    module = module_of(table)
    rows = module.finished(full_rows(table))
    figure = drawing.picture(module.TITLE, "caption", lambda figure: module.plot(figure, rows))
    if os.environ.get("KEEP_PICTURES"):
        figure.savefig(Path(os.environ["KEEP_PICTURES"]) / f"{table}.png", dpi=140)
    assert_labels_apart(figure)
    pyplot.close(figure)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_failures_alone_can_be_drawn(table):
    module = module_of(table)
    rows = module.finished([{"cell": "x", "failed": "x: it failed"}])
    assert module.bars(rows) == []
    drawing.picture(module.TITLE, "caption", lambda figure: module.plot(figure, rows))


def test_a_test_that_fails_says_why():
    found = outcomes(
        """<testsuites><testsuite><testcase name="right"/><testcase name="left out"><skipped message="no"/></testcase>
        <testcase name="wrong"><failure message="AssertionError: 3&#10; of /home/me/x.py">long</failure></testcase>
        <testcase name="broken"><error>long</error></testcase></testsuite></testsuites>"""
    )
    assert found == {"right": "", "wrong": "AssertionError: 3 of x.py", "broken": "failed"}


# -- all of it in small ----------------------------------------------------------------------


def test_a_part_has_a_process_of_its_own():
    part = Part(
        "correctness", "kernels", 0.1, (Cell("kernel top_pages", 0.1, gpu_plan.Kernel("top_pages")),), vllm=False
    )
    begin, measured = events(part, H200, None, in_process=False)
    assert begin == Event("kernel top_pages") and measured.row["right"] == measured.row["cases"] == 6


def test_a_cell_of_each_table(tmp_path):
    only = (
        "kernel lowpass",
        "kernel sparse",
        "2048 x1",
        "llada fast_dllm/dual x1",
        "toy dense 1024",
        "toy unique 1024",
        "one token a step x1",
        "4 drafts x1",
    )
    gpu.run(arguments(
        "--toy", "--in-process", "--results", str(tmp_path), *(word for one in only for word in ("--only", one))
    ))  # fmt: skip
    assert not [row for table in TABLES for row in rows(tmp_path, table).values() if "failed" in row]
    (sparse,) = rows(tmp_path, "correctness").values()
    assert sparse["right"] == sparse["cases"] == 12
    (denoised,) = rows(tmp_path, "denoising").values()
    assert denoised["steps"] == 32 and denoised["tokens_per_step"] == 1 and not denoised["cut"]
    # A CPU has no datasheet: its bound is a rate measured beside whatever else runs, so steps may beat it.
    assert denoised["of_bound"] > 0 and denoised["forward_ms"] + denoised["head_ms"] < denoised["ms_per_step"]
    each, drafts = rows(tmp_path, "rules").values()
    assert each["forwards"] == 32 > 2 * drafts["forwards"] and drafts["equal"] == "1 of 1"
    dense, unique = rows(tmp_path, "pages").values()
    assert unique["pages_share"] < 0.3 and unique["bound_ms"] < dense["bound_ms"]
    assert unique["speedup"] == dense["ms_per_step"] / unique["ms_per_step"]
    for table in TABLES:
        path = next(tmp_path.glob(f"gpu-{table}-*.json"))
        found = report.Report.read(path, module_of(table).COLUMNS)
        assert path.with_suffix(".md").read_text() == found.markdown() and path.with_suffix(".png").exists()


def test_toy_results_do_not_come_among_the_figures():
    with pytest.raises(SystemExit, match=r"--toy.*--results"):
        gpu.run(arguments("--toy"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.run(arguments("--results", str(tmp_path)))


@pytest.mark.slow
def test_the_whole_toy_run(tmp_path):
    """As a user runs it, each engine in its process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--toy", "--results", str(tmp_path)],
        cwd=ROOT, env=environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {(part.table, cell.name) for part in gpu_plan.toy() for cell in part.cells}
    found = {(table, name): row for table in TABLES for name, row in rows(tmp_path, table).items()}
    assert set(found) == expected and not [row for row in found.values() if "failed" in row]
    assert all(row["right"] == row["cases"] for (table, _), row in found.items() if table == "correctness")
