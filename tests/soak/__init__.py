"""Serves random requests for a long time and checks everything that must hold.

In process: batches of concurrent requests over every registered decoding, reuse, selection and preset, with aborts,
cache resets and hardly any memory, each answer compared with that of the request alone. A batch that fails is made
small and printed as Python. With --server: a `vllm serve` between good clients, whose answers are known, and bad ones.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # One thread: a forked copy of the process has no other, and runs beside each other do not get in their way.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def add_arguments(parser) -> None:
    parser.add_argument("--requests", type=int, default=None, help="default: 10,000 in process, 5,000 at a server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--checkpoint", action="append", help="default: the tests' tiny ones in turn; of a server the demo's"
    )
    parser.add_argument(
        "--shift", type=int, default=500, help="requests until other engines with other options take over"
    )
    parser.add_argument("--server", action="store_true", help="a server with hostile clients instead")
    parser.add_argument(
        "--small", action="store_true", help="of --server: a narrow random layer, for many steps in little time"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="of --server: end after so many denoising steps, of all requests; ten a second make 864,000 a day",
    )
    parser.add_argument("--minutes", type=float, default=0, help="of --server and --hostile: end after so long")
    parser.add_argument(
        "--hostile-mix", action="store_true", help="of --server: also random requests, and rows of the hostile table"
    )
    parser.add_argument("--hostile", action="store_true", help="the table of hostile requests at a server instead")
    parser.add_argument("--only", default="", metavar="REGEX", help='of --hostile: rows whose "kind: name" matches')
    parser.add_argument("--races", type=int, default=200, help="of --hostile: pairs of requests with one X-Request-Id")
    parser.add_argument(
        "--large", type=int, default=10 << 20, metavar="BYTES", help="of --hostile: size of an absurd body"
    )
    parser.add_argument(
        "--at-the-limit", action="store_true", help="requests that reach the model's length, in process, instead"
    )
    parser.add_argument("--folder", type=Path, help="where to write the report instead of benchmarks/results")


def run(args) -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # OpenMP has read it when torch was loaded, and forks of a process that computes with threads hang.
        os.execve(sys.executable, [sys.executable, "-m", "tests.soak", *sys.argv[1:]], os.environ | ENVIRONMENT)
    os.environ.update(ENVIRONMENT)
    chosen = [(args.server, at_a_server), (args.hostile, hostile), (args.at_the_limit, at_the_limit)]
    sys.exit(next((function for given, function in chosen if given), in_process)(args))


def in_process(args) -> int:
    os.environ.update(IN_PROCESS)
    from tests.soak import process, process_table

    checkpoints = args.checkpoint or process.complete_checkpoints()
    done, failure = process.soak(args.requests or 10_000, args.seed, args.dtype, checkpoints, args.shift)
    if failure:
        print(failure.found)
        left = len(failure.batch.entries)
        print(f"Of the batch {left} requests are left after {failure.tried} tries to make it smaller:\n")
        print(failure.python())
        return 1
    settings = _settings(args, checkpoints, "each request alone", "requests sent, and what became of them")
    _write(process_table.made(done, settings, f"soak-{args.dtype}"), args.folder)
    return 0


@contextmanager
def served_checkpoint(args) -> Iterator[str]:
    """The checkpoint that a server is started with; of `--small`, a temporary one made from it"""
    from tests.soak import served
    from vllm_dlm.demo.server import CHECKPOINT, end_when_told

    end_when_told()
    checkpoint = args.checkpoint[0] if args.checkpoint else str(CHECKPOINT)
    with TemporaryDirectory() as folder:
        if args.small:
            checkpoint = str(served.small(Path(checkpoint), Path(folder) / f"{Path(checkpoint).name}, small"))
        yield checkpoint


def at_a_server(args) -> int:
    from tests.soak import served, server_table

    with served_checkpoint(args) as checkpoint:
        work = served.soak(
            checkpoint, args.dtype, args.seed, args.requests or 5_000, args.steps, args.minutes, args.hostile_mix
        )
    for problem in work.problems[:20]:
        print(problem)
    baseline = "the server's first answers, before any hostile client"
    settings = _settings(args, [checkpoint], baseline, "requests sent, hostile ones included")
    name = f"soak-server-{'hostile-' * args.hostile_mix}{args.dtype}"
    made = server_table.made(work, settings | served.settings(work), name)
    if work.problems:
        made.notes = [f"{len(work.problems)} problems: see above"]
        made.print()
        return 1
    _write(made, args.folder, server_table.plot)
    return int(any(row["grows"] != "no" for row in made.rows))


def hostile(args) -> int:
    from benchmarks.lib.load import Load
    from tests.soak.hostile import run as hostile_run
    from tests.soak.hostile import table

    with served_checkpoint(args) as checkpoint:
        load = Load()
        with load.watch():
            plan = hostile_run.Plan(checkpoint, args.dtype, args.seed, args.only, args.races, args.large, args.minutes)
            work = hostile_run.run(plan)
    baseline = "the same server with the good clients alone, before the first row"
    settings = _settings(args, [checkpoint], baseline, "every request that was sent, per row", load)
    made = table.made(work, settings, f"soak-hostile-{args.dtype}")
    _write(made, args.folder, table.plot)
    missed = table.missed(work)
    for each in missed:
        print(each)
    return int(bool(missed))


def at_the_limit(args) -> int:
    os.environ.update(IN_PROCESS)
    from tests.soak import at_limit

    failed = False
    for name, ends in at_limit.run(args.requests or 500, args.seed, args.dtype).items():
        print(f"{name}, {args.dtype}: {ends.ends.total()} requests, (block length, end): {dict(ends.ends)}")
        for problem in ends.problems[:20]:
            print(problem)
        failed |= bool(ends.problems)
    return int(failed)


def _write(made, folder: Path | None, plot=None) -> None:
    from benchmarks.lib import report

    made.print()
    for path in made.write(folder or report.RESULTS, plot):
        print(path.name)


def _settings(args, checkpoints: list[str], baseline: str, counted: str, load=None) -> dict:
    from benchmarks.lib import report
    from benchmarks.lib.load import Load

    return {
        "shapes": [Path(checkpoint).name for checkpoint in checkpoints],
        "dtype": args.dtype,
        "seed": args.seed,
        "baseline": baseline,
        "counted": counted,
        **report.surroundings(1, load or Load(timed=False)),
    }
