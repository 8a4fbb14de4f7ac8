"""What the suites measure and in which order, without an engine."""

import pytest

from benchmarks.lib import runner, suite
from benchmarks.lib.models import SHAPES
from benchmarks.lib.report import ROOT
from benchmarks.lib.workloads import Policy, ragged
from benchmarks.suites import correctness, speed
from vllm_dlm.options import OptionError

WAYS = [[], ["--toy"], ["--device", "cuda"], ["--device", "cuda", "--toy"]]


def options(*words: str):
    return suite.parser().parse_args(words)


def planned(*words: str) -> suite.Plan:
    return suite.planned(words[0], options(*words))


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("name", [*suite.SUITES, "all"])
def test_every_part_has_a_table_and_every_cell_a_name_of_its_own(name, way):
    if name == "blocks" and "cuda" in way:
        with pytest.raises(SystemExit, match="CPU"):
            planned(name, *way)
        return
    plan = planned(name, *way)
    names = [(part.table, cell.name) for part in plan.parts for cell in part.cells]
    assert names and len(names) == len(set(names))
    assert all(cell.minutes > 0 and part.start > 0 for part in plan.parts for cell in part.cells)
    for part in plan.parts:
        table = plan.tables[part.table]
        assert all(table.settings.get(key) for key in ("shapes", "dtype", "baseline", "counted")), part.table
        assert part.table.startswith("gpu-") == ("cuda" in way) or name not in ("speed", "pages", "kernels", "all")


def test_what_a_gpu_tells_first():
    parts = planned("all", "--device", "cuda").parts
    assert parts[0].name == "kernels" and parts[1].cells[0].name == "32768 x8"
    llada = parts[2].cells
    assert [cell.name for cell in llada[:2]] == [f"llada-8b fast_dllm/dual 1024 x{n}" for n in (1, 32)]
    first_of_pages = next(part for part in parts if part.table == "gpu-pages")
    assert first_of_pages.cells[0].name == "llama-3-8b unique 131072 x1"
    # all prompts, requests and policies of both families in the end
    denoised = {
        (part.engine.shape, cell.work.policy, cell.work.prompt, cell.work.requests)
        for part in parts
        if part.table == "gpu-denoising" and part.engine.shape in ("llada-8b", "dream-7b")
        for cell in part.cells
        if cell.work.requests in speed.REQUESTS
    }
    assert len(denoised) == 2 * len(speed.ON_GPU) * 3 * 4


def test_every_quoted_time_is_part_of_the_cpus_run():
    parts = planned("all").parts
    cells = {
        (part.table, cell.work.policy, cell.work.prompt, cell.work.requests)
        for part in parts
        if part.suite == "speed"
        for cell in part.cells
    }
    for prompt in (1024, 4096):
        for count in (1, 8):
            assert {("speed-reuse", policy, prompt, count) for policy in speed.REUSE} <= cells
    assert ("speed-selection", "fast_dllm/dual+wavefilter/serve", 16384, 1) in cells
    assert ("speed-none", "loop", 480, 1) in cells
    for part in parts:
        if part.suite == "speed":
            longest = max(max(cell.work.lengths()) + cell.work.new for cell in part.cells)
            assert SHAPES[part.engine.shape].context >= longest, part.name


def test_only_takes_parts_or_cells():
    parts = runner.chosen(planned("all", "--device", "cuda").parts, ["recorded runs", "dual 1024 x1"])
    names = [cell.name for part in parts if part.table == "gpu-denoising" for cell in part.cells]
    assert names == [
        f"{shape} fast_dllm/dual 1024 x1{how}"
        for shape, how in (("llada-8b", ""), ("llada-8b", " eager"), ("dream-7b", ""))
    ]
    assert len(next(part for part in parts if part.name == "recorded runs").cells) > 1


def test_files_of_tests_exist():
    parts = planned("correctness", "--device", "cuda").parts
    files = [cell.work.path for part in parts for cell in part.cells if isinstance(cell.work, correctness.TestFile)]
    assert len(files) > 20 and not [path for path in files if not (ROOT / "tests" / path).exists()]


def test_custom_cells():
    words = ("speed", "--policy", "none", "--policy", "fast_dllm:cache=prefix", "--cells", "512x2", "--new", "64")
    plan = planned(*words)
    assert [part.engine.server for part in plan.parts] == [{}, {"reuse": {"name": "fast_dllm", "cache": "prefix"}}]
    assert [cell.work.lengths() for part in plan.parts for cell in part.cells] == [[256, 768]] * 2
    assert plan.parts[0].table == "speed-custom"
    with pytest.raises(SystemExit, match="multiple"):
        planned("speed", "--policy", "none", "--new", "50")


def test_ragged_lengths_keep_the_mean():
    lengths = ragged(480, 8)
    assert sum(lengths) == pytest.approx(8 * 480, abs=8) and len(set(lengths)) == 8


def test_policies():
    assert Policy.parse("none") == Policy("none", request={"dlm_reuse": "none"})
    both = Policy.parse("fast_dllm/dual+unique:dlm_threshold=0.9")
    assert both.request == {"dlm_reuse": "fast_dllm/dual", "dlm_selection": "unique", "dlm_threshold": 0.9}
    with pytest.raises(OptionError, match="none"):
        Policy.parse("no_such_policy")
