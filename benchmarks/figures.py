"""All times that README and docs/results.md quote, in one run on an idle machine, the most telling ones first.

Every cell is written as soon as it is measured. The same command again goes on
where it was stopped, as long as settings, versions and machine are the same. At
the end the figures of both are written anew from the tables, and tables of
speed that this run does not make are removed: they are superseded.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load, redraw, report
from benchmarks.quoted import rewritten

#: 128 new tokens in blocks of 32: 106M parameters, the head share of LLaDA-8B
REUSE = (
    "speed --name speed-reuse --title 'Speed of reuse policies' --shapes llada-proportions --no-loop "
    "--new 128 --seconds 25 --policy none --policy fast_dllm/dual --policy dllm_cache --policy dyllm "
    "--cells 1024x1,1024x8,4096x1,4096x8,256x1,256x8"
)
SELECTION = (
    "speed --name speed-selection --title 'Speed of selections over Fast-dLLM' --shapes llada-long --no-loop "
    "--new 64 --seconds 60 --policy fast_dllm/dual --policy fast_dllm/dual+wavefilter/serve "
    "--policy fast_dllm/dual+wavefilter/paper --policy fast_dllm/dual+unique --cells 4096x1,16384x1"
)
LOOP = (
    "speed --name speed-none --title 'Speed of the exact model against the published loop' --policy none "
    "--shapes llada-proportions,llada-vocabulary --cells 480x1,480x8 --seconds 25"
)
DECODE = "decode --shapes qwen1.5-0.5b --eager --repetitions 5 --new 17"


@dataclass(frozen=True)
class Stage:
    table: str
    minutes: float  # about, on two idle cores, starts of engines included
    command: str
    rows: int  # of the table, when all of its stages are done

    def arguments(self, toy: bool) -> list[str]:
        words = shlex.split(self.command)
        if not toy:
            return words
        small = {"llada-proportions": "smoke-long", "llada-long": "smoke-long", "qwen1.5-0.5b": "smoke"}
        small |= {"llada-proportions,llada-vocabulary": "smoke,smoke-long"}
        quick = [] if words[0] == "speed" else ["--quick"]
        return [small.get(word, word) for word in words] + quick


STAGES = [
    Stage("speed-reuse", 8, f"{REUSE} --only 1024x1,1024x8 --none-steps 4", 24),
    Stage("kernels-cpu", 2, "kernels --device cpu", 3),
    Stage("decode", 7, DECODE, 6),
    Stage("speed-selection", 6, SELECTION, 8),
    # All steps of `none` cost the same, and one of eight requests takes the better part of a minute.
    Stage("speed-reuse", 25, f"{REUSE} --only 4096x8 --none-steps 2", 24),
    Stage("speed-reuse", 11, f"{REUSE} --only 4096x1,256x1,256x8 --none-steps 4", 24),
    Stage("speed-none", 6, LOOP, 6),
]


def add_arguments(parser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--minutes", type=float, help="begin no measurement after so many")
    parser.add_argument("--plan", action="store_true", help="say what there is to do and how long it takes, no more")
    parser.add_argument(
        "--readme", action="store_true", help="write README and docs/results.md though some are missing"
    )
    parser.add_argument("--fresh", action="store_true", help="measure all of it again")
    parser.add_argument("--toy", action="store_true", help="try the run on toy models; needs --results")
    parser.add_argument("--threads", type=int, default=cores, help=f"(default {cores})")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    load.add_arguments(parser)


def run(args) -> None:
    if args.toy and args.results == report.RESULTS:
        raise SystemExit("--toy: name a folder for its results with --results; they are not figures")
    if args.plan:
        for stage in STAGES:
            print(f"{stage.minutes:4g} min  {stage.table:16} {stage.command}")
        print(f"{sum(stage.minutes for stage in STAGES):4g} min in all, on two idle cores")
        return
    if args.fresh:
        for stage in STAGES:
            (args.results / f"{stage.table}.json").unlink(missing_ok=True)
    begin = time.monotonic()
    around = load.settle(args.busy or args.toy, args.patience)
    failed = [stage for stage in STAGES if not measured(stage, around, begin, args)]
    done = all(complete(stage, args.results, args.busy or args.toy) for stage in STAGES)
    if done:
        redraw.again(args.results, [stage.table for stage in STAGES])  # one may have been stopped before its plot
        remove_superseded(args.results)
    if args.readme or (done and not args.toy):
        for page, text in rewritten(args.results).items():
            page.write_text(text)
    print(
        f"{(time.monotonic() - begin) / 60:.0f} minutes; "
        + ("all of it is measured" if done else "the same command goes on")
    )
    if failed:
        raise SystemExit("failed: " + ", ".join(stage.table for stage in failed))


def measured(stage: Stage, around: load.Load, begin: float, args) -> bool:
    """Runs the stage; False if it failed. One that has no minutes left is not begun."""
    left = None if args.minutes is None else args.minutes - (time.monotonic() - begin) / 60
    if left is not None and left <= 0:
        print(f"no minutes left for {stage.table}: {stage.command}")
        return True
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        *stage.arguments(args.toy),
        "--resume",
        "--results",
        str(args.results),
    ]
    command += ["--threads", str(args.threads), "--patience", str(args.patience)]
    command += ["--minutes", f"{left:.2f}"] if left is not None else []
    command += ["--busy"] if args.busy or args.toy else []
    print(f"\n== {stage.table}, about {stage.minutes:g} minutes", flush=True)
    return subprocess.run(command, env=os.environ | {load.RUN_LOAD: str(around.before)}).returncode == 0


def complete(stage: Stage, results: Path, busy: bool) -> bool:
    path = results / f"{stage.table}.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())
    found = found if busy else report.idle_part(found) or found | {"rows": []}
    return len(found["rows"]) == stage.rows and "cores_used_by_others_at_most" in found["settings"].get("load", {})


def remove_superseded(results: Path) -> None:
    for path in sorted(results.glob("speed-*")):
        if path.stem not in {stage.table for stage in STAGES}:
            print(f"superseded: {path.name}")
            path.unlink()
