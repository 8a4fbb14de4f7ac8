"""Fixtures of tests that look at the page with a browser, whatever server it comes from."""

from pathlib import Path

import pytest

from tools import browser as browsers


@pytest.fixture(scope="session")
def browser():
    program = browsers.find()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(browsers.NAMES)} is installed")
    with browsers.Browser(program) as browser:
        yield browser


@pytest.fixture
def visit(browser, server):
    """visit(width=…, dark=…) -> the page in a new tab. Whatever a test does there, the console stays empty and nobody
    but the server is asked for anything; `page.expected` are complaints of the browser that belong to the test."""
    opened = []

    def open_page(url: str = server.url + "/dlm", **how):
        page = browser.open(url, **how)
        page.expected = ()
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        errors = [error for error in page.errors if not error.startswith(tuple(page.expected))]
        foreign = [one for one in page.requests if not one.startswith((server.url, "data:", "file:", "blob:"))]
        page.close()
        assert (errors, foreign) == ([], [])


@pytest.fixture
def exported(browser, tmp_path):
    """exported(page) -> the file it was exported to"""

    def export(page) -> Path:
        browser.keep_downloads(tmp_path)
        before = set(tmp_path.glob("*.html"))
        page.click("#export")
        (file,) = browsers.eventually(lambda: set(tmp_path.glob("*.html")) - before)
        return file

    return export
