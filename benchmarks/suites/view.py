"""What looking at steps costs: the same batches with nobody looking, one request observed, and all of them.

A step takes about 25 ms here, and the machine's speed varies by a tenth from minute to minute, so whole batches cannot
show one percent. The hooks of vllm_dlm/view are therefore removed at every other step of the same batch, and thousands
of steps are compared. Afterwards many observed requests end, and the process must not have grown.
"""

import argparse
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.lib import plots
from benchmarks.lib.models import DEMO
from benchmarks.lib.report import Column, columns
from benchmarks.lib.suite import Cell, Part, Table

REQUESTS, PROMPT, NEW, ROUNDS, OBSERVED_IN_ALL = 8, 32, 16, 150, 1000
BASELINE, NOBODY = "hooks taken out", "nobody looks"
OBSERVED = {"one request observed": 1, "all requests observed": REQUESTS}
COLUMNS = columns(
    """
    who | who looks
    ms | ms a step | {:.2f}
    share | of the baseline | {:.4f}
    steps | steps
    others | cores of others | {:.2f}
    failed | failed
    """
)
COLUMNS.insert(3, Column("interval", "95 %", lambda bounds: "{:.4f} to {:.4f}".format(*bounds)))
COLUMNS.insert(
    5, Column("memory", "memory before and after", lambda found: f"{found['before']} MiB, {found['after']} MiB")
)
NOTES = [
    "Shares are of medians over all steps; their bounds come from drawing the rounds again, a thousand times.",
    f"memory: of the process, before and after {OBSERVED_IN_ALL:,} observed requests.",
]


@dataclass(frozen=True)
class Case:
    rounds: int
    observed: int


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    settings = {
        "shapes": f"demo checkpoint, {REQUESTS} requests of {PROMPT} + {NEW} tokens, every row in every step",
        "dtype": "float32",
        "baseline": f"{BASELINE}: every other step of the same batches",
        "counted": "wall time of each of the engine's steps, output included",
        "rounds": ROUNDS,
    }
    return {"view": Table("What it costs to look at steps", COLUMNS, NOTES, settings, spread, plot=plot)}


def parts(options: argparse.Namespace) -> list[Part]:
    case = Case(3, 16) if options.toy else Case(ROUNDS, OBSERVED_IN_ALL)
    return [Part("view", "view", "the demo", (Cell("steps", 0.5 if options.toy else 10.0, case),))]


def opened(part: Part, options: argparse.Namespace):
    batches = Batches()

    def measure(case: Case) -> dict:
        batches.round()  # what happens only once must not count
        rounds = [batches.round() for _ in range(case.rounds)]
        rows = [row(who, rounds) for who in (BASELINE, NOBODY, *OBSERVED)]
        rows[-1]["memory"] = batches.memory(case.observed)
        return {"rows": rows}

    return measure


def spread(rows: list[dict]) -> list[dict]:
    """The rows of the cell"""
    return [
        own | {key: value for key, value in each.items() if key == "others"}
        for each in rows
        for own in each.get("rows", [each])
    ]


def row(who: str, rounds: list[dict[str, np.ndarray]]) -> dict:
    own, base = (np.array([each[name] for each in rounds]) for name in (who, BASELINE))  # [rounds, steps]
    random = np.random.default_rng(0)
    drawn = [random.integers(len(rounds), size=len(rounds)) for _ in range(1000)]
    shares = [np.median(own[some]) / np.median(base[some]) for some in drawn]
    middle = float(np.median(own))
    found = {"who": who, "ms": middle * 1e3, "share": float(middle / np.median(base)), "steps": own.size}
    return found | {"interval": np.quantile(shares, [0.025, 0.975]).tolist()}


class Batches:
    def __init__(self) -> None:
        from benchmarks.lib import engines

        self.llm = engines.start(
            DEMO, 1 << 27, dtype="float32", max_model_len=PROMPT + NEW, enforce_eager=True, max_num_seqs=REQUESTS
        )
        self.params, self.count = engines.sampling(NEW, {}, ignore_eos=True), 0

    def round(self) -> dict[str, np.ndarray]:
        """Seconds of each step. A step without hooks in one batch has them in the next."""
        even, odd = (self.seconds(out=lambda step, rest=rest: step % 2 == rest) for rest in (0, 1))
        at = np.arange(len(even)) % 2 == 0
        found = {BASELINE: np.where(at, even, odd), NOBODY: np.where(at, odd, even)}
        return found | {who: self.seconds(observed) for who, observed in OBSERVED.items()}

    def seconds(self, observed: int = 0, out=lambda step: False) -> np.ndarray:
        from benchmarks.lib import internals

        engine = self.llm.llm_engine
        for number in range(REQUESTS):
            self.count += 1
            name, params = f"bench-{self.count}", self.params.clone()
            if number < observed:
                params.extra_args = {"dlm_frames": 1}
                internals.observe_request(name)
            prompt = {"prompt_token_ids": [(7 * self.count + at) % 390 for at in range(PROMPT)]}
            engine.add_request(name, prompt, params)
        seconds: list[float] = []
        while engine.has_unfinished_requests():
            if out(len(seconds)):
                with internals.view_hooks_removed(self.llm):
                    seconds.append(internals.timed_step(self.llm))
            else:
                seconds.append(internals.timed_step(self.llm))
        internals.forget_observed()
        return np.array(seconds)

    def memory(self, observed: int) -> dict:
        """MiB of the process, and Python's objects, before and after `observed` requests"""
        found: dict = {"requests": observed}
        for when, batches in (("before", 4), ("after", -(-observed // REQUESTS))):
            for _ in range(batches):
                self.seconds(REQUESTS)
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            found |= {when: round(pages / 2**20, 1), f"objects_{when}": len(gc.get_objects())}
        return found


def plot(figure, rows: list[dict]) -> None:
    """Who looks on the y axis, with the bounds of each share"""
    rows = [row for row in rows if "share" in row]
    axes, at = figure.subplots(), np.arange(len(rows))[::-1]
    share = np.array([each["share"] for each in rows])
    low, high = np.array([each["interval"] for each in rows]).T
    axes.errorbar(share, at, xerr=[share - low, high - share], fmt="o", color=plots.BLUE, capsize=3)
    axes.axvline(1.0, color=plots.GREY, linewidth=0.8)
    axes.set_yticks(at, [each["who"] for each in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("time of a step, of that without the hooks (bounds: 95 %)")
