"""README, docs and CONTRIBUTING as their tests read them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    page: str
    language: str
    text: str


def examples() -> list[Example]:
    return [Example(page.name, *found) for page in PAGES for found in FENCE.findall(page.read_text())]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page: Path) -> list[str]:
    """Relative ones, of text and of pictures."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


def named_paths(page: Path) -> list[str]:
    """Files and folders of this repository in `code`: what has a slash and an ending, or ends with a slash."""
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    return [span for span in spans if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/|[\w.\-]+(/[\w.\-]+)+\.\w+", span)]


def words(text: str) -> list[str]:
    """Of shell commands, one after the other."""
    return shlex.split(text.replace("\\\n", " "), comments=True)


def tables_by_section(page: Path) -> dict[str, list[list[str]]]:
    """Heading -> rows of the tables below it, without their heads"""
    found: dict[str, list[list[str]]] = {}
    section = ""
    for line in prose(page).splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("| `"):
            found.setdefault(section, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found
