"""The page as one file: `page.html` with the style sheet and the scripts written into it.

Nothing is fetched from anywhere, so an exported page is complete, too. Its Content-Security-Policy names this one
script by its hash: whatever a model writes, nothing else on the page can run. An exported file has the policy in its
text; a server sends it as a header as well, with what only a header can say.
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
def script() -> str:
    scripts = "".join((FOLDER / name).read_text() for name in SCRIPTS)
    # The page's own names stay its own; the line ends are part of what is hashed.
    return f'"use strict";\n(() => {{\n{scripts}}})();\n'


@cache
def policy() -> str:
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def headers() -> dict[str, str]:
    """Of the page: no site may show it in a frame, where it could be made to send requests in a user's name."""
    return {
        "Content-Security-Policy": f"{policy()}; frame-ancestors 'none'",
        "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


@cache
def page() -> str:
    text = (FOLDER / "page.html").read_text()
    for mark, put in (
        ("/* page.css */", (FOLDER / "page.css").read_text()),
        ("/* scripts */", script()),
        ("POLICY", policy()),
    ):
        assert text.count(mark) == 1, mark
        text = text.replace(mark, put)
    return text
