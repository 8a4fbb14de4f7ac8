"""The results in the repository: tables that say what their JSON says, plots whose labels can be read."""

import json

import pytest

from benchmarks.lib import plots, quoted, report
from benchmarks.lib.redraw import writer_of
from tests.labels import assert_labels_apart

NAMES = [path.stem for path in sorted(report.RESULTS.glob("*.json")) if path.stem != "demo"]  # another kind of table


def read(name: str) -> tuple[report.Report, object]:
    columns, plot = writer_of(name)
    return report.Report.read(report.RESULTS / f"{name}.json", columns), plot


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_their_json(name):
    found, plot = read(name)
    assert (report.RESULTS / f"{name}.md").read_text() == found.markdown()
    assert (report.RESULTS / f"{name}.png").exists() == (plot is not None)


@pytest.mark.parametrize("name", [name for name in NAMES if writer_of(name)[1]])
def test_no_label_of_a_plot_lies_over_another_or_outside(name):
    from matplotlib import pyplot

    found, plot = read(name)
    figure = plots.picture(found.title, report.caption(found.settings), lambda figure: plot(figure, found.rows))
    assert_labels_apart(figure)
    pyplot.close(figure)


def test_pages_quote_their_tables():
    for page, text in quoted.rewritten(report.RESULTS).items():
        assert page.read_text() == text, f"{page.name}: `python -m benchmarks redraw` writes it again"


def test_every_table_names_a_commit():
    for name in NAMES:
        assert read(name)[0].settings["commit"], name


def test_nothing_names_a_machine():
    for path in report.RESULTS.glob("*.json"):
        settings = json.loads(path.read_text()).get("settings", {})
        assert not {"host", "hostname", "user", "path"} & set(settings)
