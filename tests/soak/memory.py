"""Resident memory, threads and descriptors of every process of a server, and whether they grow. Linux only."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: of the samples: what a server does before it has seen everything once
WARM_UP = 0.3
#: samples are averaged over so many stretches, whose means are nearly independent; single samples are not
STRETCHES = 20
LEAST_OF = 1000  # requests of a stretch whose least memory counts
MEASURES = ("rss_kib", "threads", "descriptors")


@dataclass(frozen=True)
class Sample:
    requests: int
    steps: float
    process: str
    rss_kib: int
    threads: int
    descriptors: int
    pid: int = 0


def sample(session: int, requests: int, steps: float) -> list[Sample]:
    """Of all processes of the session, which is what `start_new_session` made."""
    found = []
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            pages = int((folder / "statm").read_text().split()[1])
            name = title(folder)
            found.append(
                Sample(
                    requests,
                    steps,
                    f"{name} {len([s for s in found if s.process.startswith(name)]) + 1}",
                    pages * os.sysconf("SC_PAGE_SIZE") >> 10,
                    int(fields[17]),
                    len(os.listdir(folder / "fd")),
                    int(folder.name),
                )
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


def title(folder: Path) -> str:
    """Short and without paths: vLLM names its engine, the others are known by what they run."""
    command = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    for words, name in (
        ("resource_tracker", "resource tracker"),
        (" serve ", "front-end"),
        ("EngineCore", "engine"),
    ):
        if words in f"{command} ":
            return name
    return (folder / "comm").read_text().strip()


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(growth per unit of x, its standard error): a line through the means of STRETCHES stretches"""
    count = min(STRETCHES, len(x))
    if count < 3:
        return 0.0, float("inf")
    x, y = (np.array([part.mean() for part in np.array_split(np.asarray(v, float), count)]) for v in (x, y))
    return line(x, y)


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, its standard error) of a line through the points, whose errors are independent"""
    count = len(x)
    if count < 3:
        return 0.0, float("inf")
    centred = x - x.mean()
    spread = (centred**2).sum()
    if not spread:
        return 0.0, float("inf")
    growth = (centred * y).sum() / spread
    residual = y - y.mean() - growth * centred
    return float(growth), float(np.sqrt((residual**2).sum() / (count - 2) / spread))


def least_of_stretches(samples: list[Sample]) -> list[tuple[float, float]]:
    """(requests so far, least resident KiB) of each whole stretch of LEAST_OF requests. Unlike a mean, the least does
    not depend on what happened to be in flight, or on memory that was free but not yet returned."""
    found: dict[int, list[Sample]] = defaultdict(list)
    for each in samples:
        found[each.requests // LEAST_OF].append(each)
    whole = sorted(found)[:-1]  # the last one may be cut short
    return [((number + 1) * LEAST_OF, min(each.rss_kib for each in found[number])) for number in whole]


def least_growth(samples: list[Sample]) -> tuple[float, float, bool]:
    """(KiB per 1,000 requests, its standard error, whether it grows): a line through the least of each stretch after
    the warm-up"""
    points = least_of_stretches(samples)
    warm = np.array(points[int(len(points) * WARM_UP) :], float).reshape(-1, 2)
    x, y = warm[:, 0] / 1000, warm[:, 1]
    per, error = line(x, y)
    return per, error, len(x) > 2 and grows(per, error, x[-1] - x[0], y.mean())


def by_process(samples: list[Sample]) -> dict[str, list[Sample]]:
    found = defaultdict(list)
    for each in samples:
        found[each.process].append(each)
    return dict(found)


def growth(samples: list[Sample]) -> list[dict]:
    """A row per process: each measure after the warm-up, and what it gains per 1,000 requests."""
    rows = []
    for process, own in by_process(samples).items():
        warm = own[int(len(own) * WARM_UP) :]
        x = np.array([each.requests for each in warm]) / 1000
        row = {"process": process, "samples": len(warm)}
        for measure in MEASURES:
            y = np.array([getattr(each, measure) for each in warm], float)
            per, error = slope(x, y)
            row[measure] = {
                "first": y[0],
                "last": y[-1],
                "most": y.max(),
                "per_1000_requests": per,
                "standard_error": error,
                "grows": grows(per, error, x[-1] - x[0], y.mean()),
            }
        rows.append(row)
    return rows


def grows(per: float, error: float, length: float, mean: float) -> bool:
    """More than chance explains, and enough to matter: a fiftieth of what is there, within the run."""
    return bool(per > 3 * error and per * length > mean / 50)
