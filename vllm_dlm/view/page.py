"""The page of /dlm."""

from functools import cache
from pathlib import Path


@cache
def page() -> str:
    return Path(__file__).with_name("page.html").read_text()
