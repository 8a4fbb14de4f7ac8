"""The page as a single file: `page.html` with embedded style sheet and scripts.

The page loads nothing else, so an exported page is complete, too. Its Content-Security-Policy allows only this script,
by its hash, so text of a model cannot run as a script. An exported file contains the policy. A server also sends it as
a header, with directives that are only valid there.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
#: in the order of the page; each script uses earlier ones, and `page.js` starts the page
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
    # The function keeps names local. Line ends are part of the hash.
    return f'"use strict";\n(() => {{\n{scripts}}})();\n'


@cache
def policy() -> str:
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def headers() -> dict[str, str]:
    """Headers of the page. They forbid frames, in which other sites could make it send requests on behalf of a user."""
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
