"""Waiting for an idle machine, telling one's own work from that of others: clocks and processes are made up."""

import pytest

from benchmarks import load


@pytest.fixture
def clock(monkeypatch):
    """Time passes only by sleeping."""
    now = [0.0]
    monkeypatch.setattr(load.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(load.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.delenv(load.RUN_LOAD, raising=False)
    return now


def averages(monkeypatch, *values):
    left = list(values)
    monkeypatch.setattr(load, "load_average", lambda: left.pop(0) if len(left) > 1 else left[0])


def process(proc, number: int, parent: int, name: str, *ticks: int) -> None:
    (proc / str(number)).mkdir()
    fields = ["S", parent, *[0] * 9, *ticks, 0, 0]
    (proc / str(number) / "stat").write_text(f"{number} ({name}) " + " ".join(map(str, fields)))


def test_own_work_is_that_of_descendants_living_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(load.os, "sysconf", lambda _: 100)
    process(tmp_path, 10, 1, "benchmark", 100, 20, 3000, 400)  # user, system, and of children that have ended
    process(tmp_path, 11, 10, "a) (worker", 5, 0, 0, 0)
    process(tmp_path, 12, 11, "its child", 7, 0, 0, 0)
    process(tmp_path, 20, 1, "somebody else", 100000, 0, 0, 0)
    (tmp_path / "13").mkdir()  # ended between listing and reading
    assert load.own_seconds(10, tmp_path) == 35.32


def test_busy_is_all_but_idle_and_disk(monkeypatch):
    monkeypatch.setattr(load.os, "sysconf", lambda _: 100)
    assert load.busy_seconds("cpu  1 2 4 100000 50000 8 16 32 0 0\ncpu0 9 9 9 9 9 9 9 9 9 9\n") == 0.63


def test_it_waits_and_says_so(clock, monkeypatch, capsys):
    averages(monkeypatch, 1.5, 1.5, 0.9, 0.3, 0.29)
    found = load.settle(busy=False, patience=60, pause=5)
    assert found.before == 0.29 and found.waited == clock[0] == 15
    said = capsys.readouterr().out
    assert said.startswith("waiting for an idle machine: 1.5 cores wanted") and said.endswith("idle after 15 s\n")


def test_it_gives_up_in_time(clock, monkeypatch):
    averages(monkeypatch, 2.0)
    with pytest.raises(SystemExit, match=r"not idle: 2\.0 cores wanted after waiting 60 s.*--busy"):
        load.settle(busy=False, patience=60, pause=5)
    assert clock[0] == 60


def test_busy_measures_at_once(clock, monkeypatch):
    averages(monkeypatch, 2.0)
    found = load.settle(busy=True, patience=60)
    assert clock[0] == 0 and found.settings()["average_before"] == 2.0


def test_within_a_run_the_run_itself_is_nobody_else(clock, monkeypatch, capsys):
    averages(monkeypatch, 1.9)
    monkeypatch.setenv(load.RUN_LOAD, "0.07")
    others = [0.8, 0.02]
    monkeypatch.setattr(load, "others_now", lambda seconds: others.pop(0))
    stated = load.settle(busy=False, patience=60, pause=5).settings()
    assert stated["average_before"] == 0.07 and stated["average_at_end"] == 1.9 and not others
    assert "whole run" in stated["average_before_is_of"]
    assert "0.8 cores wanted" in capsys.readouterr().out


def test_the_most_that_others_used_is_stated():
    found = load.Load(before=0.1, others=[0.02, 0.4, 0.0])
    assert found.settings()["cores_used_by_others_at_most"] == 0.4
    assert "cores_used_by_others_at_most" not in load.Load(before=0.1).settings()
