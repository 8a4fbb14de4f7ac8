"""The speed command end to end on a toy shape, in processes of its own as a user runs it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoints import SHAPES
from benchmarks.speed_table import base_row, engine_row, with_ratios
from benchmarks.workload import BLOCK, Cell, Policy
from vllm_dlm.options import OptionError

ROOT = Path(__file__).resolve().parents[2]
SHAPE = SHAPES["smoke"]


def command(folder, *more: str) -> str:
    """Unpinned and on one thread: the numbers do not matter here, and whoever else runs is not in the way."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMP_"))}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "DLM_BENCH_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "speed", "--policy", "none", "--policy", "fast_dllm/dual", "--quick",
         "--threads", "1", "--repetitions", "2", "--seconds", "1e9", "--new", "64", "--blocks", "1", "--name", "speed",
         "--results", str(folder), *more],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    command(folder)
    return folder, json.loads((folder / "speed.json").read_text())


def of_none(data: dict) -> list[dict]:
    return [row for row in data["rows"] if row["method"] == "none"]


def exact_block_flops(rows: int) -> int:
    """The first block's steps by formula: in the last layer only keys and values need all rows."""
    width, square = SHAPE.width, 2 * SHAPE.width**2
    per_step = (SHAPE.layers - 1) * (2 * rows * SHAPE.layer_weights + 4 * rows**2 * width) + 2 * rows * square
    per_head_row = 2 * SHAPE.layer_weights - 2 * square + 4 * rows * width + 2 * SHAPE.head_weights
    return BLOCK * per_step + sum(range(1, BLOCK + 1)) * per_head_row


@pytest.mark.slow
def test_rows_of_the_table(result):
    _, data = result
    methods = [("loop", 1), ("none", 1), ("fast_dllm/dual", 1), ("none", 8), ("fast_dllm/dual", 8)]
    assert [(row["method"], row["batch"]) for row in data["rows"]] == methods
    for row in data["rows"]:
        assert len(row["seconds"]) == 2 and row["vs_loop"] > 0
    for row in of_none(data):
        assert row["steps"] == BLOCK  # all requests advance side by side, one token each per step


def test_numbers_of_a_row():
    """Of made-up times: 32 steps of two requests in a median of 4 s, of which the model takes 3."""
    cell, policy = Cell(prompt=96, new=64, batch=2, blocks=1), Policy("none")
    counts = {"steps": 32, "flops": 10, "rows": SHAPE.layers * cell.rows() * BLOCK // 2, "head_rows": 32 * 2 * 7}
    runs = [
        counts | {"seconds": 1.0 * times, "worker": 0.875 * times, "forward": 0.5 * times, "head": 0.25 * times}
        for times in (2, 4, 16)
    ]
    row = engine_row(SHAPE, policy, cell, runs)
    assert (row["seconds"], row["tokens_per_s"], row["ms_per_step"]) == ([2, 4, 16], 16, 125)
    assert (row["steps"], row["rows_share"], row["head_rows_per_request_step"]) == (32, 0.5, 7)
    assert row["overhead"] == 0.25
    assert row["share_of_time"] == {
        "forward": 0.5, "head": 0.25, "worker, outside the model": 0.125, "outside the worker": 0.125,
    }  # fmt: skip


def test_ratios_of_rows():
    def row(method: str, batch: int, seconds: float) -> dict:
        cell = Cell(prompt=96, new=64, batch=batch, blocks=1)
        return base_row(SHAPE, method, cell, [seconds]) | {"flops": cell.dense_flops(SHAPE) // 2}

    rows = [row("loop", 1, 8.0), row("none", 1, 2.0), row("none", 2, 4.0), row("dyllm", 2, 1.0)]
    rows.append(row("dyllm+unique", 2, 0.5))
    found = [(r["vs_loop"], r.get("vs_none"), r.get("vs_host")) for r in with_ratios(rows)]
    assert found == [(1, None, None), (4, 1, None), (4, 1, None), (16, 4, None), (32, 8, 0.5)]


@pytest.mark.slow
def test_counts_go_on_until_all_have_delivered(result):
    """Refreshes of different requests keep out of each other's steps: eight of them take more steps than one."""
    one, eight = (row for row in result[1]["rows"] if row["method"] == "fast_dllm/dual")
    assert one["steps"] == BLOCK < eight["steps"]
    assert one["rows_share"] == first_block_share(one)
    # nothing of the first block is missed; who is through with it has gone on when the last one delivers
    assert eight["rows_share"] >= first_block_share(eight)


def first_block_share(row: dict) -> float:
    """A refresh takes all rows but in the last layer, which goes on with the block's; then there are only those."""
    lengths = Cell(row["prompt"], row["new"], row["batch"], row["blocks"]).lengths()
    refreshes = sum((SHAPE.layers - 1) * (length + row["new"]) + BLOCK for length in lengths)
    rows = refreshes + row["batch"] * (BLOCK - 1) * BLOCK * SHAPE.layers
    return rows / (SHAPE.layers * BLOCK * sum(length + row["new"] for length in lengths))


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(result):
    folder, _data = result
    before = (folder / "speed.json").read_bytes()
    assert command(folder, "--resume") == "speed.json has all of it already\n"
    assert (folder / "speed.json").read_bytes() == before


@pytest.mark.slow
def test_counted_flops_are_the_formula(result):
    for row in of_none(result[1]):
        lengths = Cell(row["prompt"], row["new"], row["batch"], row["blocks"]).lengths()
        assert row["flops"] == sum(exact_block_flops(length + row["new"]) for length in lengths)
        assert row["head_rows_per_request_step"] == (BLOCK + 1) / 2


@pytest.mark.slow
def test_files_name_neither_host_nor_paths(result):
    folder, _ = result
    for name in ("speed.json", "speed.md"):
        text = (folder / name).read_text()
        assert str(ROOT) not in text and str(folder) not in text and socket.gethostname() not in text
    assert (folder / "speed.png").stat().st_size > 1000


def test_ragged_lengths_keep_the_mean():
    cell = Cell(prompt=480, new=32, batch=8, blocks=1)
    assert sum(cell.lengths()) == pytest.approx(8 * 480, abs=8)
    assert len(set(cell.lengths())) == 8


def test_policies():
    assert Policy.parse("none") == Policy("none", request={"dlm_reuse": "none"})
    with pytest.raises(OptionError, match="none"):
        Policy.parse("no_such_policy")
