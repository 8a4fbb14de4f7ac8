"""The run that makes the README's figures: that its commands are right, tried without an engine."""

import argparse
import importlib
import json

import pytest

from benchmarks import figures, load, quoted
from benchmarks.checkpoints import SHAPES
from benchmarks.load import Load
from benchmarks.report import surroundings
from benchmarks.workload import Policy


def parsed(stage: figures.Stage, toy: bool = False) -> argparse.Namespace:
    command, *words = stage.arguments(toy)
    parser = argparse.ArgumentParser()
    importlib.import_module(f"benchmarks.{command}").add_arguments(parser)
    return parser.parse_args([*words, "--resume", "--minutes", "1", "--threads", "1", "--patience", "1", "--busy"])


@pytest.mark.parametrize("toy", [False, True])
@pytest.mark.parametrize("stage", figures.STAGES, ids=lambda stage: f"{stage.table}-{stage.minutes}")
def test_its_commands_are_commands(stage, toy):
    args = parsed(stage, toy)
    if stage.command.startswith("speed"):
        assert args.name == stage.table and set(args.only or args.cells) <= set(args.cells)
        shapes = [SHAPES[name] for name in args.shapes]
        longest = max(max(figures_cell(prompt, args, batch).lengths()) for prompt, batch in args.cells) + args.new
        for policy in args.policy:
            Policy.parse(policy)
        if not toy:
            assert all(shape.context >= longest for shape in shapes)
            loops = 0 if args.no_loop else len({prompt for prompt, _ in args.cells})
            assert stage.rows == len(shapes) * (len(args.cells) * len(args.policy) + loops)


def figures_cell(prompt, args, batch):
    from benchmarks.workload import Cell

    return Cell(prompt, args.new, batch, 1)


def test_stages_of_a_table_measure_each_of_its_cells_once():
    reuse = [parsed(stage) for stage in figures.STAGES if stage.table == "speed-reuse"]
    once = [cell for args in reuse for cell in args.only]
    assert sorted(once) == sorted(reuse[0].cells) and len(set(once)) == len(once)
    differing = {"only", "none_steps"}
    settings = [{key: value for key, value in vars(args).items() if key not in differing} for args in reuse]
    assert all(one == settings[0] for one in settings)
    assert (4096, 8) in once


@pytest.fixture
def quiet(monkeypatch):
    """Nothing is waited for, and commands are noted instead of run."""
    ran = []

    class Done:
        returncode = 0

    monkeypatch.setattr(load, "settle", lambda busy, patience: Load(before=0.05))
    monkeypatch.setattr(figures.subprocess, "run", lambda command, env: ran.append((command, env)) or Done())
    return ran


def arguments(*words):
    parser = argparse.ArgumentParser()
    figures.add_arguments(parser)
    return parser.parse_args(words)


def test_the_run_goes_through_its_stages(quiet, tmp_path, capsys):
    figures.run(arguments("--toy", "--results", str(tmp_path), "--threads", "1"))
    assert [command[3] for command, _ in quiet] == [stage.command.split()[0] for stage in figures.STAGES]
    for command, environment in quiet:
        assert environment[load.RUN_LOAD] == "0.05"
        assert {"--resume", "--threads", "--results"} <= set(command)
    assert "the same command goes on" in capsys.readouterr().out


def test_no_stage_begins_after_its_minutes(quiet, tmp_path, monkeypatch, capsys):
    minutes = iter([0, 0, 9, 11, 11, 11, 11, 11, 11])
    monkeypatch.setattr(figures.time, "monotonic", lambda: 60.0 * next(minutes))
    figures.run(arguments("--toy", "--results", str(tmp_path), "--minutes", "10"))
    assert [command[command.index("--minutes") + 1] for command, _ in quiet] == ["10.00", "1.00"]
    assert capsys.readouterr().out.count("no minutes left") == len(figures.STAGES) - 2


def test_toy_results_do_not_come_among_the_figures(quiet):
    with pytest.raises(SystemExit, match=r"--toy.*--results"):
        figures.run(arguments("--toy"))
    assert not quiet


def write(folder, name: str, rows: list[dict], before: float = 0.1) -> None:
    settings = surroundings(2, Load(before=before, others=[0.02]))
    (folder / f"{name}.json").write_text(json.dumps({"settings": settings, "rows": rows}))


def test_superseded_tables_leave(tmp_path):
    for name in ("speed-reuse", "speed-reuse-1024", "speed-none", "decode", "quality"):
        write(tmp_path, name, [])
    figures.remove_superseded(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {"speed-reuse", "speed-none", "decode", "quality"}


def test_a_table_is_complete_with_all_rows_of_such_a_run(tmp_path):
    stage = next(stage for stage in figures.STAGES if stage.table == "decode")
    assert not figures.complete(stage, tmp_path, busy=False)
    write(tmp_path, "decode", [{}] * 5)
    assert not figures.complete(stage, tmp_path, busy=False)
    write(tmp_path, "decode", [{}] * 6)
    assert figures.complete(stage, tmp_path, busy=False)


def test_the_pages_quote_what_the_tables_say(tmp_path):
    cell = {"prompt": 1024, "batch": 1}
    write(tmp_path, "speed-reuse", [
        {"method": "fast_dllm/dual", "vs_none": 12.34} | cell, {"method": "dllm_cache", "vs_none": 9.87} | cell,
        {"method": "dllm_cache", "vs_none": 5.0, "prompt": 4096, "batch": 8},
    ])  # fmt: skip
    text = quoted.table(tmp_path)
    (alone,) = [line for line in text.splitlines() if "1,024 prompt + 128 new tokens, 1 request:" in line]
    assert "| 12.3x, 9.9x, not measured |" in alone
    (eight,) = [line for line in text.splitlines() if "4,096 prompt + 128 new tokens, 8 requests:" in line]
    assert "| not measured, 5.0x, not measured |" in eight
    assert "Load average before it: 0.1; others used at most 0.02 cores" in text and "NOT IDLE" not in text
    write(tmp_path, "decode", [], before=0.5)
    assert quoted.table(tmp_path) == text  # beside times of an idle machine no others are quoted
    write(tmp_path, "speed-reuse", [], before=0.5)
    assert "Load average before it: 0.5" in quoted.table(tmp_path) and "NOT IDLE" in quoted.table(tmp_path)


def test_the_readme_says_only_what_was_measured(tmp_path):
    decoded = {"method": "unique", "speedup": 2.44}
    write(tmp_path, "decode", [decoded | {"batch": 1}])
    assert "times as fast" not in quoted.sentences(tmp_path)
    write(tmp_path, "decode", [decoded | {"batch": 1}, decoded | {"batch": 4, "speedup": 4.16}])
    (said,) = [line for line in quoted.sentences(tmp_path).splitlines() if line.startswith("- ")]
    assert "2.4 and 4.2 times as fast" in said


def test_a_page_keeps_what_stands_around_its_figures():
    text = f"before\n{quoted.BEGIN}\nold\n{quoted.END}\nafter\n"
    made = quoted.put_into(text, "new")
    assert made == f"before\n{quoted.BEGIN}\nnew\n{quoted.END}\nafter\n"
    assert quoted.put_into(made, "new") == made
    with pytest.raises(ValueError, match="once each"):
        quoted.put_into("no place", "new")
