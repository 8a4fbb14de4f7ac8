"""What the suites conclude from their measurements, and their plots; engines only where marked slow."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.lib import models, plots, report, runner, suite
from benchmarks.lib.bounds import Peaks
from benchmarks.lib.engines import Run, Step
from benchmarks.lib.models import SHAPES
from benchmarks.lib.report import ROOT, Report
from benchmarks.lib.workloads import compare, difference, wilson
from benchmarks.suites import correctness, kernels, pages, rules, speed_table
from tests.benchmarks.test_plan import options, planned
from tests.benchmarks.test_runner import rows
from tests.labels import assert_labels_apart
from vllm_dlm.step.counts import Counts


def test_numbers_of_a_row():
    """Two runs of three steps of two requests, half of the rows recomputed; the median step takes twice its bound."""
    shape = SHAPES["toy-llada"]

    def steps(*times):
        counts = Counts(head_rows=1)
        counts.rows["feed_forward"] = 2 * 2 * 80 // 2
        return [Step(counts, 2, 2, ms, ms / 2, ms / 4) for ms in times]

    peaks = Peaks(shape.weight_bytes() / 1e-3, 1e30)  # weights take a millisecond
    both = [Run(steps(1, 2, 8), 2.0, 6, True), Run(steps(1, 2, 3), 1.0, 6, True)]
    found = speed_table.summary(both, shape, peaks, 80)
    assert (found["steps"], found["at_once"], found["tokens_per_step"], found["rows_share"]) == (3, 2, 1.0, 0.5)
    assert (found["median_ms"], found["of_weights"], found["bound_by"]) == (2, 0.5, "bytes")
    assert found["of_bound"] == pytest.approx(0.5) and found["of_bound_all"] == pytest.approx(6 / 17)
    assert (found["forward_ms"], found["head_ms"], found["host_ms"]) == (1.0, 0.5, 0.5)
    assert (found["tokens_per_s"], found["ms_per_step"]) == (4.5, 500.0)
    assert found["overhead"] == pytest.approx(1 - 0.75 * 17e-3 / 3)
    assert found["head_rows_per_request_step"] == 0.5 and "kv_share" not in found
    unsplit = [replace(step, forward_ms=None) for step in steps(1, 2)]
    assert "host_ms" not in speed_table.summary([Run(unsplit, 1.0, 4, True)], shape, peaks, 80)


def test_ratios_of_rows():
    def row(method: str, requests: int, seconds: float) -> dict:
        made = {"shape": "toy-llada", "method": method, "prompt": 96, "new": 64, "requests": requests, "steps": 32}
        return made | {"tokens_per_s": requests * 32 / seconds, "ms_per_step": 1e3 * seconds / 32, "flops": 10}

    given = [row("loop", 1, 8.0), row("none", 1, 2.0), row("none", 2, 4.0), row("dyllm", 2, 1.0)]
    given.append(row("dyllm+unique", 2, 0.5))
    found = {(r["method"], r["requests"]): r for r in speed_table.finished(given)}
    ratios = [(r["vs_loop"], r.get("vs_none"), r.get("vs_host"), r.get("vs_one")) for r in found.values()]
    assert ratios == [
        (1, None, None, None),
        (4, 1, None, None),
        (4, 1, None, 1),
        (16, 4, None, None),
        (32, 8, 0.5, None),
    ]
    assert found["none", 1]["flops_vs_loop"] == 1 and "flops_vs_loop" not in found["none", 2]


def test_speed_is_told_against_dense_attention_of_the_same_shape_and_requests():
    times = {("a", "dense", 1): 40.0, ("a", "unique", 1): 10.0, ("a", "dense", 4): 90.0, ("a", "unique", 4): 60.0}
    times |= {("b", "unique", 1): 5.0}
    given = [
        {"shape": shape, "method": method, "context": 9, "asked": count, "requests": count, "ms_per_step": ms}
        for (shape, method, count), ms in times.items()
    ]
    assert [row.get("speedup") for row in pages.finished(given)] == [1.0, 4.0, 1.0, 1.5, None]


def test_texts_are_compared_token_for_token():
    assert difference("x", [1, 2, 3], [1, 5, 3]) == "x: token 1 is 2 and not 5"
    assert difference("x", [1, 2], [1, 2, 3]) == "x: 2 tokens instead of 3"
    found = compare(["a", "b"], [[1, 2], [3, 4]], [[1, 2], [3, 5]])
    assert found == {"cases": 2, "right": 1, "agreement": 0.75, "first": "b: token 1 is 4 and not 5"}
    low, high = wilson(9, 10)
    assert 0.59 < low < 0.6 and 0.98 < high < 0.99


def test_drafts_must_give_the_texts_of_one_token_a_step():
    base = {"method": "one token a step", "requests": 1, "tokens_per_s": 10.0, "against": None, "texts": [7]}
    drafts = {"method": "freedave, 4 drafts", "requests": 1, "tokens_per_s": 20.0, "against": "one token a step"}
    _, same, other = rules.finished(
        [base, drafts | {"texts": [7]}, drafts | {"method": "freedave, 8 drafts", "texts": [8]}]
    )
    assert (same["ratio"], same["equal"], other["equal"]) == (2.0, "1 of 1", "0 of 1")
    assert "2.00 times" in rules.bars([base, same])[0]


def test_bars_are_told_from_their_rows():
    cell = {"shape": "llada-8b", "method": "fast_dllm/dual", "prompt": 1024, "ms_per_step": 5.0, "of_weights": 0.62}
    both = speed_table.finished(
        [
            cell | {"requests": 32, "tokens_per_s": 1800.0},
            cell | {"requests": 1, "tokens_per_s": 200.0},
            {"failed": "none: no"},
        ]
    )
    assert [row.get("requests") for row in both] == [1, 32, None]
    assert [told.rpartition(": ")[2] for told in speed_table.bars(both)] == ["62%.", "9.0 times."]
    cell = {"shape": "llama-3-8b", "context": 131072, "asked": 8, "requests": 3, "bound_ms": 1.0}
    unique = cell | {"method": "unique", "ms_per_step": 5.0, "pages_share": 0.02}
    both = pages.finished([unique, cell | {"method": "dense", "ms_per_step": 30.0}])
    assert [row["method"] for row in both] == ["dense", "unique"] and both[1]["speedup"] == 6
    assert "6.0 (llama-3-8b, 3)" in pages.bars(both)[0] and "at least 6.00 times" in pages.bars(both)[1]
    told = kernels.bars([{"keys": 32768, "batch": 8, "flash_ratio": 13.0, "ratio": 9.0}])
    assert "13.0 times FlashAttention" in told[0]


def test_a_test_that_fails_says_why():
    found = correctness.outcomes(
        """<testsuites><testsuite><testcase name="right"/><testcase name="left out"><skipped message="no"/></testcase>
        <testcase name="wrong"><failure message="AssertionError: 3&#10; of /home/me/x.py">long</failure></testcase>
        <testcase name="broken"><error>long</error></testcase></testsuite></testsuites>"""
    )
    assert found == {"right": "", "wrong": "AssertionError: 3 of x.py", "broken": "failed"}


# -- plots -----------------------------------------------------------------------------------------------------------

GPU_TABLES = ("gpu-correctness", "gpu-kernels", "gpu-denoising", "gpu-rules", "gpu-pages")


def full_rows(table: str) -> list[dict]:
    """Of every cell of the plan, with numbers of some width"""
    made = []
    parts = [part for part in planned("all", "--device", "cuda").parts if part.table == table]
    for i, (part, cell) in enumerate((own, cell) for own in parts for cell in own.cells):
        row = {"cell": cell.name, "cases": 10, "right": 7 + i % 4, "ms_per_step": 12.34 + i, "of_bound": 0.4567}
        row |= {"ratio": 11.11 + i, "flash_ratio": 12.2, "bound_ratio": 14.25}
        work, spec = cell.work, part.engine
        if table == "gpu-correctness":
            kind = "kernel" if part.name == "kernels" else part.name
            row |= {"kind": kind, "what": getattr(work, "name", cell.name), "by": getattr(work, "dtype", "float32")}
            row |= {"error": 0.001 * 3**i} if kind == "kernel" else {"agreement": 0.97} if "graphs" in kind else {}
        elif table == "gpu-kernels":
            row |= {"keys": work.keys, "batch": work.batch, "dense": {}, "dense_kernel": "x"}
        elif table == "gpu-denoising":
            row |= {"shape": spec.shape, "method": work.policy + (", eager" if spec.eager else ""), "new": work.new}
            row |= {"prompt": work.prompt, "requests": work.requests, "tokens_per_s": 1.0, "of_weights": 0.5}
        elif table == "gpu-rules":
            row |= {"method": work.method.label, "against": work.method.against, "requests": work.requests}
            row |= {"tokens_per_s": 123.4 + i, "texts": [1]}
        else:
            row |= {"shape": spec.shape, "method": "unique" if spec.selection else "dense", "bound_ms": 1.0}
            row |= {"context": work.context, "asked": work.requests, "requests": work.requests}
        made.append(row)
    return [*made, {"cell": "x", "failed": "x: it failed"}]


@pytest.mark.parametrize("name", GPU_TABLES)
def test_no_label_of_a_full_plot_lies_over_another(name):
    from matplotlib import pyplot

    table = planned("all", "--device", "cuda").tables[name]
    rows = table.finish(full_rows(name))
    figure = plots.picture(table.title, "caption", lambda figure: table.plot(figure, rows))
    if os.environ.get("KEEP_PICTURES"):
        figure.savefig(Path(os.environ["KEEP_PICTURES"]) / f"{name}.png", dpi=140)
    assert_labels_apart(figure)
    pyplot.close(figure)


@pytest.mark.parametrize("name", GPU_TABLES)
def test_a_table_of_failures_alone_can_be_drawn(name):
    table = planned("all", "--device", "cuda").tables[name]
    rows = table.finish([{"cell": "x", "failed": "x: it failed"}])
    assert table.bars(rows) == []
    plots.picture(table.title, "caption", lambda figure: table.plot(figure, rows))


# -- all of it in small ----------------------------------------------------------------------------------------------


def exact_flops(shape, rows: int, steps: int, block: int = 32) -> int:
    """The first steps of the first block by formula: in the last layer only keys and values need all rows."""
    width, square, layers = shape.model.hidden, 2 * shape.model.hidden**2, shape.model.layers
    per_step = (layers - 1) * (2 * rows * shape.layer_weights + 4 * rows**2 * width) + 2 * rows * square
    per_head_row = 2 * shape.layer_weights - 2 * square + 4 * rows * width + 2 * shape.head_weights
    return steps * per_step + sum(block - step for step in range(steps)) * per_head_row


@pytest.mark.slow
def test_a_cell_of_each_table(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    only = (
        "kernel wavelet",
        "kernel sparse",
        "llada fast_dllm/dual",
        "toy-llada none 48 x1",
        "toy-llama dense 1024",
        "toy-llama unique 1024",
        "one token a step x1",
        "4 drafts x1",
    )
    words = [word for one in only for word in ("--only", one)]
    runner.run(options("all", "--device", "cuda", "--toy", "--in-process", "--results", str(tmp_path), *words))
    found = {name: rows(tmp_path, f"{name}-cpu") for name in GPU_TABLES if name != "gpu-kernels"}
    assert not [row for table in found.values() for row in table.values() if "failed" in row]
    assert found["gpu-correctness"]["kernel sparse_attention"]["right"] == 12
    exact, whole = found["gpu-denoising"].values()
    assert whole["steps"] == 32 and whole["tokens_per_step"] == 1 and not whole["cut"]
    # A CPU has no datasheet: its bound is a rate measured under load, so steps may beat it.
    assert whole["of_bound"] > 0 and whole["forward_ms"] + whole["head_ms"] > 0
    assert exact["steps"] == 4 and exact["flops"] == exact_flops(SHAPES["toy-llada"], 80, 4)
    assert exact["head_rows_per_request_step"] == (32 + 29) / 2
    each, drafts = found["gpu-rules"].values()
    assert each["forwards"] == 32 > 2 * drafts["forwards"] and drafts["equal"] == "1 of 1"
    dense, unique = found["gpu-pages"].values()
    assert unique["pages_share"] < 0.3 and unique["bound_ms"] < dense["bound_ms"]
    assert unique["speedup"] == dense["ms_per_step"] / unique["ms_per_step"]
    plan = planned("all", "--device", "cuda", "--toy")
    for name in found:
        path = tmp_path / f"{name}-cpu.json"
        made = Report.read(path, plan.tables[name].columns)
        assert path.with_suffix(".md").read_text() == made.markdown() and path.with_suffix(".png").exists()
        text = path.read_text()
        assert str(ROOT) not in text and str(tmp_path) not in text and report.commit() in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("all", ("--device", "cuda")),
        ("all", ()),
        *((name, ()) for name in suite.SUITES if name not in ("correctness",)),
    ],
)
def test_toy_runs(name, words, tmp_path, monkeypatch):
    """As a user runs them, each engine in its process"""
    monkeypatch.setenv("DLM_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    given = options(name, *words, "--toy", "--threads", "1", "--results", str(tmp_path))
    done = runner.run(given)
    assert done.complete
    expected = {(part.table, cell.name) for part in done.parts for cell in part.cells}
    found = {(table, name): row for table, own in done.rows.items() for name, row in own.items()}
    assert set(found) == expected and not [row for row in found.values() if "failed" in row]
    assert all(row["right"] == row["cases"] for (table, _), row in found.items() if table.endswith("correctness"))
