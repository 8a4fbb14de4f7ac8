"""The pictures of the documentation: their labels can be read, and each is drawn and shown."""

import pytest

from docs.pictures import draw, view
from tests.docs.pages import PAGES, links
from tests.labels import assert_labels_apart


@pytest.mark.parametrize("name", draw.PICTURES)
def test_labels_can_be_read(name):
    from matplotlib import pyplot

    figure = draw.picture(name)
    assert_labels_apart(figure)
    pyplot.close(figure)


def test_each_is_drawn_and_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".svg")}
    drawn = {draw.FOLDER / f"{name}.svg" for name in draw.PICTURES}
    assert shown == drawn == set(draw.FOLDER.glob("*.svg"))


def test_pictures_of_the_live_view_are_shown_and_small():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if "pictures/view-" in link}
    there = set(draw.FOLDER.glob("*.png"))
    assert shown == there
    assert {file.stem for file in there} == set(view.NAMES)
    assert max(file.stat().st_size for file in there) < 200_000
