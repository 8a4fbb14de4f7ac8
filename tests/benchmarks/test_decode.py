"""The decode command end to end on a toy shape, in processes of its own as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.decode import with_ratios

ROOT = Path(__file__).resolve().parents[2]


def test_speed_is_told_against_dense_attention_of_the_same_shape_and_batch():
    times = {("a", "dense", 1): 40.0, ("a", "unique", 1): 10.0, ("a", "dense", 4): 90.0, ("a", "unique", 4): 60.0}
    times |= {("b", "unique", 1): 5.0}
    names = ("shape", "method", "batch")
    rows = with_ratios([dict(zip(names, key, strict=True)) | {"ms_per_token": ms} for key, ms in times.items()])
    assert [row.get("speedup") for row in rows] == [1.0, 4.0, 1.0, 1.5, None]


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "OMP_"))}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "decode", "--quick", "--eager", "--new", "17", "--repetitions", "2",
         "--threads", "1", "--results", str(tmp_path)],
        cwd=ROOT, env=environment | {"DLM_BENCH_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads((tmp_path / "decode.json").read_text())
    rows = {(row["method"], row["batch"]): row for row in data["rows"]}
    assert len(rows) == 6
    for batch in (1, 4):
        chosen = rows["unique, dense_layers []", batch]
        low, high = sorted(chosen["seconds_per_step"])  # two repetitions
        assert 1000 * low <= chosen["ms_per_token"] <= 1000 * high
        assert chosen["pages_share"] == chosen["kv_share"] < 0.15  # 8 of 64 to 66 pages
    equal = data["settings"]["full_budget_equals_dense"]
    assert equal["equal_with_all pages"] == equal["texts"] > equal["equal_with_256 tokens"]
