"""Waiting for an idle machine, and CPU time of other processes: clocks and processes are made up."""

from types import SimpleNamespace

import pytest

from benchmarks.lib import load


@pytest.fixture
def clock(monkeypatch):
    """Time passes only by sleeping."""
    now = [0.0]
    monkeypatch.setattr(load.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(load.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def averages(monkeypatch, *values):
    left = list(values)
    monkeypatch.setattr(load, "load_average", lambda: left.pop(0) if len(left) > 1 else left[0])


class Process:
    """Stands in for psutil's."""

    def __init__(self, user=0.0, system=0.0, children_user=0.0, children_system=0.0, children=(), ended=False):
        times = {"user": user, "system": system, "children_user": children_user, "children_system": children_system}
        self.times, self.own, self.ended = SimpleNamespace(**times), children, ended

    def children(self, recursive: bool):
        assert recursive
        return self.own

    def cpu_times(self):
        if self.ended:
            raise load.psutil.NoSuchProcess(1)
        return self.times


def test_own_work_is_that_of_descendants_living_and_ended(monkeypatch):
    descendants = (Process(0.05), Process(0.07), Process(ended=True))
    monkeypatch.setattr(load.psutil, "Process", lambda: Process(1.0, 0.2, 30.0, 4.0, descendants))
    assert load.own_seconds() == pytest.approx(35.32)


def test_busy_is_all_but_idle_and_disk(monkeypatch):
    times = {"user": 0.01, "nice": 0.02, "system": 0.04, "idle": 1e5, "iowait": 5e4, "irq": 0.08, "softirq": 0.16}
    monkeypatch.setattr(load.psutil, "cpu_times", lambda: SimpleNamespace(**times, steal=0.32))
    assert load.busy_seconds() == pytest.approx(0.63)


def test_others_are_what_is_busy_less_oneself(monkeypatch):
    moments = iter([(10.0, 100.0, 50.0), (20.0, 115.0, 60.0)])
    monkeypatch.setattr(load.Watch, "_now", lambda self: next(moments))
    with load.Load().watch() as watch:
        pass
    assert watch.others == 0.5 and watch.load.others == [0.5]


def test_it_waits_and_says_so(clock, monkeypatch, capsys):
    averages(monkeypatch, 1.5, 1.5, 0.9, 0.3, 0.29)
    found = load.settle(busy=False, patience=60, pause=5)
    assert found.before == 0.29 and found.waited == clock[0] == 15
    said = capsys.readouterr().out
    assert said.startswith("waiting for an idle machine: load average 1.5") and said.endswith("idle after 15 s\n")


def test_it_gives_up_in_time(clock, monkeypatch):
    averages(monkeypatch, 2.0)
    with pytest.raises(SystemExit, match=r"not idle: load average 2\.0 after waiting 60 s.*--busy"):
        load.settle(busy=False, patience=60, pause=5)
    assert clock[0] == 60


def test_busy_measures_at_once(clock, monkeypatch):
    averages(monkeypatch, 2.0)
    found = load.settle(busy=True, patience=60)
    assert clock[0] == 0 and found.settings()["average_before"] == 2.0


def test_the_most_that_others_used_is_stated():
    found = load.Load(before=0.1, others=[0.02, 0.4, 0.0])
    assert found.settings()["cores_used_by_others_at_most"] == 0.4
    assert "cores_used_by_others_at_most" not in load.Load(before=0.1).settings()
