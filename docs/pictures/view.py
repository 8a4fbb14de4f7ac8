"""Pictures of the live view: `python -m docs.pictures.view` serves the bundled checkpoint, asks it with a headless
Chromium, and writes them anew beside this file. Everything in them is of these runs.
"""

import json
import random
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tools.browser import Browser, Page, eventually, find
from vllm_dlm.demo.questions import recall
from vllm_dlm.demo.server import DEMO, Server

FOLDER = Path(__file__).parent
NAMES = COMPARE, PHONE, PAGE = "view-compare", "view-phone", "view-page"
PROMPT = recall(random.Random(3), sentences=12, hidden=4, asked=3).prompt
TOKENS = "64"
BLOCK = "16"
#: of the second policy; the first does without both
REUSE = "dllm_cache"
SELECTION = {"name": "unique", "budget_tokens": 96, "page_size": 16, "min_context": 64}
CONFIG = json.dumps({"reuse": {"name": REUSE}, "selection": SELECTION})


def main() -> None:
    program = find()
    if program is None:
        sys.exit("A browser is needed: Chromium or Chrome.")
    with Server(*DEMO, "--dlm-config", CONFIG) as server, Browser(program) as browser:
        server.wait(600)
        with asked(browser, server.url) as (page, file):
            compared(browser, file)
            phone(browser, file)
            whole(page)


@contextmanager
def asked(browser: Browser, url: str):
    """The page after two runs, and what it exported."""
    page = browser.open(f"{url}/dlm", width=1000, height=1200, dark=True)
    for policy in (1, 2):
        fields = f"#policies fieldset:nth-child({policy})"
        for option in ("reuse", "selection"):
            page.choose(f"{fields} [data-option={option}]", "none" if policy == 1 else "")
        page.evaluate(f"document.querySelector('{fields} [data-option=dlm_block_length]').value = {BLOCK}")
    page.click("#compare")
    page.evaluate(f"document.querySelector('#max-tokens').value = {TOKENS}")
    page.click("#prompt")
    page.write(PROMPT)
    for _ in range(2):  # what happens only once shall not count
        page.click("#start")
        page.until("document.querySelector('#stop').hidden && said.textContent.includes('tokens in')", timeout=120)
    with tempfile.TemporaryDirectory() as folder:
        browser.keep_downloads(Path(folder))
        page.click("#export")
        (file,) = eventually(lambda: list(Path(folder).glob("*.html")))
        yield page, file


def slide(page: Page, share: float) -> None:
    page.evaluate(f"moment.value = Math.round({share} * moment.max); moment.dispatchEvent(new Event('input'))")


def compared(browser: Browser, file: Path) -> None:
    page = browser.open(file.as_uri(), width=1040, height=800, ratio=1.25)
    slide(page, 0.6)
    page.resize(1040, page.evaluate("Math.ceil(document.body.getBoundingClientRect().height)"), 1.25)
    page.picture(FOLDER / f"{COMPARE}.png")


def phone(browser: Browser, file: Path) -> None:
    page = browser.open(file.as_uri(), width=360, height=780, ratio=1.5)
    slide(page, 0.4)
    page.click(".canvas .cell:nth-child(4)")
    page.evaluate("legend.scrollIntoView({block: 'start'})")
    page.picture(FOLDER / f"{PHONE}.png")


def whole(page: Page) -> None:
    slide(page, 1)
    page.evaluate("scrollTo(0, 0)")
    page.picture(FOLDER / f"{PAGE}.png")


if __name__ == "__main__":
    main()
