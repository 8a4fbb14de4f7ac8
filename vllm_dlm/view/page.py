"""The page as one file: `page.html` with the style sheet and the scripts beside it written into it.

Nothing is fetched from anywhere, so that what the page exports is whole, too. Its Content-Security-Policy names this
one script by its hash: whatever a model writes, nothing else on the page can run.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
#: in the order in which they stand in the page; each uses those before it, `page.js` starts
SCRIPTS = (
    "run.js",
    "colours.js",
    "canvas.js",
    "heat.js",
    "network.js",
    "options.js",
    "export.js",
    "stage.js",
    "page.js",
)


@cache
def page() -> str:
    scripts = "".join((FOLDER / name).read_text() for name in SCRIPTS)
    # The page's own names stay its own; the line ends are part of what is hashed.
    script = f'"use strict";\n(() => {{\n{scripts}}})();\n'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = (FOLDER / "page.html").read_text()
    for mark, put in (
        ("/* page.css */", (FOLDER / "page.css").read_text()),
        ("/* scripts */", script),
        ("SCRIPT-HASH", f"sha256-{digest}"),
    ):
        assert text.count(mark) == 1, mark
        text = text.replace(mark, put)
    return text
