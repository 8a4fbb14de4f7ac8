import json

import pytest

from benchmarks.lib import plots, report
from benchmarks.lib.load import Load
from benchmarks.lib.report import Column, Report, machine, resumed, surroundings, versions

SETTINGS = {"shapes": "width 64", "dtype": "bfloat16", "baseline": "the loop", "counted": "tokens delivered"}


def table(around: Load, **more) -> Report:
    return Report(
        name="table",
        title="A table",
        settings=SETTINGS | surroundings(2, around) | more,
        columns=[
            Column("method", "method"),
            Column("speed", "t/s", "{:.1f}"),
            Column("ratio", "×"),
            Column("unused", "?"),
        ],
        notes=["tokens/s counts delivered tokens"],
        rows=[{"method": "none", "speed": 1.25, "more": 3}, {"method": "loop", "speed": 1.0, "ratio": 2}],
    )


def bars(figure, rows):
    plots.bars(figure.subplots(), {"all": {row["method"]: row["speed"] for row in rows}}, "tokens/s")


def test_report_is_complete_and_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.load.load_average", lambda: 1.7)
    first, second = (table(Load(before=0.1)).write(tmp_path / name, bars) for name in "ab")
    assert [path.name for path in first] == ["table.json", "table.md", "table.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    text = first[1].read_text()
    assert "| method | t/s | × |\n" in text  # a column that no row has is left out
    assert "| none | 1.2 | – |" in text
    assert "machine.threads: 2" in text and "- tokens/s counts delivered tokens" in text
    assert '"more": 3' in first[0].read_text()  # JSON has what the table leaves out
    assert "- Baseline: the loop.\n- Counted: tokens delivered.\n" in text
    assert "2 threads; load average 0.1 before the start, 1.7 at the end.\n" in text
    again = Report.read(first[0], table(Load(before=0.1)).columns)
    assert again.markdown() == text


@pytest.mark.parametrize("key", report.REQUIRED)
def test_a_result_that_does_not_state_its_conditions_is_refused(key):
    with pytest.raises(ValueError, match=f"table: settings do not state {key}"):
        table(Load(before=0.1), **{key: None})


@pytest.mark.parametrize(("before", "others", "idle"), [(0.29, 0.1, True), (0.3, 0.1, False), (0.1, 0.3, False)])
def test_the_table_and_the_plot_say_whether_the_machine_was_idle(before, others, idle):
    found = table(Load(before=before, others=[0.0, others]))
    for text in (found.markdown(), report.caption(found.settings)):
        assert f"others used at most {others} cores" in text
        assert ("NOT IDLE" in text) != idle


def test_rows_are_kept_only_under_the_same_conditions(tmp_path):
    (path, _) = table(Load(before=0.1), lengths=(1, 2)).write(tmp_path)
    wanted = SETTINGS | {"lengths": (1, 2)}
    assert resumed(path, wanted, 2, busy=False) == json.loads(path.read_text())
    assert resumed(path, wanted | {"lengths": (1, 3)}, 2, busy=False) is None
    assert resumed(path, wanted, 1, busy=False) is None
    assert resumed(tmp_path / "no.json", wanted, 2, busy=False) is None
    (path, _) = table(Load(before=1.0), lengths=(1, 2)).write(tmp_path)
    assert resumed(path, wanted, 2, busy=False) is None
    assert resumed(path, wanted, 2, busy=True)["rows"]


def test_a_busy_moment_costs_the_rows_it_met_and_no_others(tmp_path):
    busy = table(Load(before=0.1, others=[0.1, 0.4]))
    busy.rows = [{"length": 1, "others": 0.1}, {"length": 2, "others": 0.4}]
    (path, _) = busy.write(tmp_path)
    kept = resumed(path, SETTINGS, 2, busy=False)
    assert kept["rows"] == busy.rows[:1]
    assert kept["settings"]["load"]["cores_used_by_others_at_most"] == 0.1 and report.is_idle(kept["settings"]["load"])
    assert resumed(path, SETTINGS, 2, busy=True)["rows"] == busy.rows


def test_the_worst_load_of_several_sittings_is_stated():
    load = {"average_before": 0.2, "average_at_end": 3.0, "waited_s": 10, "cores_used_by_others_at_most": 0.05}
    found = surroundings(2, Load(before=0.1, others=[0.2]), {"load": load})["load"]
    assert (found["average_before"], found["cores_used_by_others_at_most"], found["sittings"]) == (0.2, 0.2, 2)
    assert ", in 2 sittings" in report.under_load(found)


def test_every_table_names_the_commits_it_was_measured_at(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "commit", lambda: "abc")
    around = Load(before=0.1)
    assert "commit: abc" in table(around).markdown()
    earlier = {"load": around.settings(), "commit": "abc"}
    assert surroundings(2, around, earlier)["commit"] == "abc"
    assert surroundings(2, around, earlier | {"commit": "old"})["commit"] == "old, abc"


def test_the_commit_is_told_where_git_is_missing(tmp_path, monkeypatch):
    assert report.commit() != "unknown"
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("DLM_BENCH_COMMIT", "named")
    assert report.commit() == "named"


def test_machine_and_versions_name_what_decides_speed():
    found = machine(threads=2)
    assert found["cpu"] and found["cores"] >= 1 and found["threads"] == 2
    assert {"python", "torch", "vllm_dlm"} <= set(versions())
