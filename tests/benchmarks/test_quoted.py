"""The figures that pages quote"""

import json

import pytest

from benchmarks.lib import quoted
from benchmarks.lib.load import Load
from benchmarks.lib.report import surroundings


def write(folder, name: str, rows: list[dict], before: float = 0.1) -> None:
    settings = surroundings(2, Load(before=before, others=[0.02]))
    (folder / f"{name}.json").write_text(json.dumps({"settings": settings, "rows": rows}))


def test_the_pages_quote_what_the_tables_say(tmp_path):
    cell = {"prompt": 1024, "requests": 1}
    write(
        tmp_path,
        "speed-reuse",
        [
            {"method": "fast_dllm/dual", "vs_none": 12.34} | cell,
            {"method": "dllm_cache", "vs_none": 9.87} | cell,
            {"method": "dllm_cache", "vs_none": 5.0, "prompt": 4096, "requests": 8},
        ],
    )
    text = quoted.table(tmp_path)
    (alone,) = [line for line in text.splitlines() if "1,024 prompt + 128 new tokens, 1 request:" in line]
    assert "| 12.3x, 9.9x, not measured |" in alone
    (eight,) = [line for line in text.splitlines() if "4,096 prompt + 128 new tokens, 8 requests:" in line]
    assert "| not measured, 5.0x, not measured |" in eight
    assert "Load average before it: 0.1; others used at most 0.02 cores" in text and "NOT IDLE" not in text
    write(tmp_path, "decode", [], before=0.5)
    assert quoted.table(tmp_path) == text  # with times of an idle machine, no others are quoted
    write(tmp_path, "speed-reuse", [], before=0.5)
    assert "Load average before it: 0.5" in quoted.table(tmp_path) and "NOT IDLE" in quoted.table(tmp_path)


def test_the_readme_says_only_what_was_measured(tmp_path):
    decoded = {"method": "unique", "speedup": 2.44}
    write(tmp_path, "decode", [decoded | {"requests": 1}])
    assert "times as fast" not in quoted.sentences(tmp_path)
    write(tmp_path, "decode", [decoded | {"requests": 1}, decoded | {"requests": 4, "speedup": 4.16}])
    (said,) = [line for line in quoted.sentences(tmp_path).splitlines() if line.startswith("- ")]
    assert "2.4 and 4.2 times as fast" in said


def test_a_page_keeps_what_is_around_its_figures():
    text = f"before\n{quoted.BEGIN}\nold\n{quoted.END}\nafter\n"
    made = quoted.put_into(text, "new")
    assert made == f"before\n{quoted.BEGIN}\nnew\n{quoted.END}\nafter\n"
    assert quoted.put_into(made, "new") == made
    with pytest.raises(ValueError, match="once each"):
        quoted.put_into("no place", "new")
