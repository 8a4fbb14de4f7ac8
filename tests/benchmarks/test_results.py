"""The results in the repository: tables that say what their JSON says, plots whose labels can be read."""

import itertools
import json

import pytest

from benchmarks import drawing, figures, quoted, report
from benchmarks.redraw import writer_of

NAMES = [path.stem for path in sorted(report.RESULTS.glob("*.json")) if path.stem != "demo"]  # another kind of table


def read(name: str) -> tuple[report.Report, object]:
    writer = writer_of(name)
    return report.Report.read(report.RESULTS / f"{name}.json", writer.COLUMNS), getattr(writer, "plot", None)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_their_json(name):
    found, plot = read(name)
    assert (report.RESULTS / f"{name}.md").read_text() == found.markdown()
    assert (report.RESULTS / f"{name}.png").exists() == (plot is not None)


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(writer_of(name), "plot")])
def test_no_label_of_a_plot_lies_over_another_or_outside(name):
    from matplotlib import pyplot

    found, plot = read(name)
    figure = drawing.picture(found.title, report.caption(found.settings), lambda figure: plot(figure, found.rows))
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    pyplot.close(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text!r} leaves the picture"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{one!r} lies over {other!r}"


def drawn_texts(figure) -> list:
    """Without the labels of ticks that lie beyond the ends of their axes, which matplotlib keeps but does not draw."""
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    of_ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text not in of_ticks]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def test_the_readme_quotes_its_tables():
    """As soon as the run that makes them has been."""
    readme = quoted.README.read_text()
    measured = all(figures.complete(stage, report.RESULTS) for stage in figures.STAGES)
    assert not measured or quoted.put_into(readme, report.RESULTS) == readme
    assert readme.count(quoted.BEGIN) == readme.count(quoted.END) == 1


def test_no_table_of_speed_is_superseded():
    measured = all(figures.complete(stage, report.RESULTS) for stage in figures.STAGES)
    speeds = {path.stem for path in report.RESULTS.glob("speed-*.json")}
    assert not measured or speeds == {stage.table for stage in figures.STAGES if stage.table.startswith("speed")}


def test_nothing_names_a_machine():
    for path in report.RESULTS.glob("*.json"):
        settings = json.loads(path.read_text()).get("settings", {})
        assert not {"host", "hostname", "user", "path"} & set(settings)
