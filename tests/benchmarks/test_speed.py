"""The speed command end to end on a toy shape, in processes of its own as a user runs it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cells import BLOCK, Cell, Policy
from benchmarks.checkpoints import SHAPES
from vllm_dlm.options import OptionError

ROOT = Path(__file__).resolve().parents[2]
SHAPE = SHAPES["smoke"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "speed", "--policy", "none", "--quick", "--repetitions", "1",
         "--new", "64", "--blocks", "1", "--results", str(folder)],
        cwd=ROOT, env=environment | {"DLM_BENCH_CACHE": str(folder / "cache")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "speed-none.json").read_text())


def exact_block_flops(rows: int) -> int:
    """The first block's steps by formula: in the last layer only keys and values need all rows."""
    width, square = SHAPE.width, 2 * SHAPE.width**2
    per_step = (SHAPE.layers - 1) * (2 * rows * SHAPE.layer_weights + 4 * rows**2 * width) + 2 * rows * square
    per_head_row = 2 * SHAPE.layer_weights - 2 * square + 4 * rows * width + 2 * SHAPE.head_weights
    return BLOCK * per_step + sum(range(1, BLOCK + 1)) * per_head_row


def test_rows_of_the_table(result):
    _, data = result
    assert [(row["method"], row["batch"]) for row in data["rows"]] == [("loop", 1), ("none", 1), ("none", 8)]
    for row in data["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * BLOCK / row["seconds"][0], rel=1e-3)
    loop, one, eight = data["rows"]
    assert one["vs_loop"] == pytest.approx(one["tokens_per_s"] / loop["tokens_per_s"])
    for row in (one, eight):
        assert row["steps"] == BLOCK  # all requests advance side by side, one token each per step
        assert 0 < row["overhead"] < 1
        assert sum(row["share_of_time"].values()) == pytest.approx(1)


def test_counted_flops_are_the_formula(result):
    for row in result[1]["rows"][1:]:
        lengths = Cell(row["prompt"], row["new"], row["batch"], row["blocks"]).lengths()
        assert row["flops"] == sum(exact_block_flops(length + row["new"]) for length in lengths)
        assert row["head_rows_per_request_step"] == (BLOCK + 1) / 2


def test_files_name_neither_host_nor_paths(result):
    folder, _ = result
    for name in ("speed-none.json", "speed-none.md"):
        text = (folder / name).read_text()
        assert str(ROOT) not in text and str(folder) not in text and socket.gethostname() not in text
    assert (folder / "speed-none.png").stat().st_size > 1000


def test_ragged_lengths_keep_the_mean():
    cell = Cell(prompt=480, new=32, batch=8, blocks=1)
    assert sum(cell.lengths()) == pytest.approx(8 * 480, abs=8)
    assert len(set(cell.lengths())) == 8


def test_policies():
    assert Policy.parse("none") == Policy("none", request={"dlm_reuse": "none"})
    with pytest.raises(OptionError, match="none"):
        Policy.parse("no_such_policy")
