"""What looking at steps costs: the same batches with nobody looking, with one request observed and with all of them.

A step takes some 25 ms here, and a minute is slower than the next by a tenth: whole batches cannot tell one per cent.
The hooks of vllm_dlm/view are therefore put in and taken out of the way at every other step of the same batch, and
thousands of steps are compared. Then so many observed requests end, and the process is as large as before.
"""

import asyncio
import gc
import os
import time
from pathlib import Path

import numpy as np

from benchmarks import drawing, report
from benchmarks import load as idle

REQUESTS, PROMPT, NEW = 8, 32, 16
BASELINE, NOBODY = "hooks taken out", "nobody looks"
OBSERVED = {"one request observed": 1, "all requests observed": REQUESTS}
COLUMNS = [
    report.Column("who", "who looks"),
    report.Column("ms", "ms a step", "{:.2f}"),
    report.Column("share", "of the baseline", "{:.4f}"),
    report.Column("interval", "95 %", lambda bounds: "{:.4f} to {:.4f}".format(*bounds)),
    report.Column("steps", "steps"),
]


def add_arguments(parser) -> None:
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--observed", type=int, default=1000, help="requests after which memory is compared")
    parser.add_argument("--checkpoint", type=Path, help="default: the demo's")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    idle.add_arguments(parser)


def run(args) -> None:
    load = idle.settle(args.busy, args.patience)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    batches = Batches(args.checkpoint)
    batches.round()  # what happens only once shall not count
    with load.watch():
        rounds = [batches.round() for _ in range(args.rounds)]
    result = report.Report(
        "view",
        "What it costs to look at steps",
        settings(args, batches)
        | report.surroundings(batches.threads, load)
        | {"memory": batches.memory(args.observed)},
        COLUMNS,
        ["Shares are of medians over all steps; their bounds come of drawing the rounds anew, a thousand times."],
        [row(who, rounds) for who in (BASELINE, NOBODY, *OBSERVED)],
    )
    result.print()
    result.write(args.output, plot)


def row(who: str, rounds: list[dict[str, np.ndarray]]) -> dict:
    own, base = (np.array([each[name] for each in rounds]) for name in (who, BASELINE))  # [rounds, steps]
    random = np.random.default_rng(0)
    drawn = [random.integers(len(rounds), size=len(rounds)) for _ in range(1000)]
    shares = [np.median(own[some]) / np.median(base[some]) for some in drawn]
    return {
        "who": who,
        "ms": float(np.median(own)) * 1e3,
        "share": float(np.median(own) / np.median(base)),
        "interval": np.quantile(shares, [0.025, 0.975]).tolist(),
        "steps": own.size,
    }


def plot(figure, rows: list[dict]) -> None:
    """Who looks down the side, with the bounds of each share."""
    axes = figure.subplots()
    at = np.arange(len(rows))[::-1]
    share = np.array([each["share"] for each in rows])
    low, high = np.array([each["interval"] for each in rows]).T
    axes.errorbar(share, at, xerr=[share - low, high - share], fmt="o", color=drawing.BLUE, capsize=3)
    axes.axvline(1.0, color=drawing.GREY, linewidth=0.8)
    axes.set_yticks(at, [each["who"] for each in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("time of a step, of that without the hooks (bounds: 95 %)")


def settings(args, batches: "Batches") -> dict:
    return {
        "shapes": f"{batches.layers} layers, {REQUESTS} requests of {PROMPT} + {NEW} tokens, every row in every step",
        "dtype": "float32",
        "baseline": f"{BASELINE}: every other step of the same batches",
        "counted": "wall time of each of the engine's steps, output included",
        "rounds": args.rounds,
    }


class Batches:
    def __init__(self, checkpoint: Path | None):
        import torch
        from vllm import LLM, SamplingParams

        from vllm_dlm.demo.server import CHECKPOINT

        self.llm = LLM(
            str(checkpoint or CHECKPOINT), dtype="float32", max_model_len=PROMPT + NEW, enforce_eager=True,
            kv_cache_memory_bytes=1 << 27, max_num_seqs=REQUESTS, disable_log_stats=True,
        )  # fmt: skip
        self.engine, self.threads = self.llm.llm_engine, torch.get_num_threads()
        self.params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        core = self.engine.engine_core.engine_core
        self.seeing = core.model_executor.driver_worker.worker.model_runner.seeing
        self.layers = core.scheduler.model_shape.layers
        self.count = 0

    def round(self) -> dict[str, np.ndarray]:
        """Seconds of the steps of each. A step in which the hooks are out in one batch has them in the next."""
        even, odd = (self.seconds(out=lambda step, rest=rest: step % 2 == rest) for rest in (0, 1))
        at = np.arange(len(even)) % 2 == 0
        return {BASELINE: np.where(at, even, odd), NOBODY: np.where(at, odd, even)} | {
            who: self.seconds(observed) for who, observed in OBSERVED.items()
        }

    def seconds(self, observed: int = 0, out=lambda step: False) -> np.ndarray:
        from types import SimpleNamespace

        from vllm_dlm.integration.view import ADDED
        from vllm_dlm.limits import Limits
        from vllm_dlm.view.hub import HUB, Follower
        from vllm_dlm.view.observed import ObservedRequest

        class Reader(Follower):
            """Reads each frame at once, as a connection does."""

            def notify(self, at_once: bool = False) -> None:
                asyncio.run(self.take())

        for number in range(REQUESTS):
            self.count += 1
            name, params = f"bench-{self.count}", self.params
            if number < observed:
                params = params.clone()
                params.extra_args = {"dlm_frames": 1}
                options = SimpleNamespace(frames=True, watch=False, observed=True, trajectory=False)
                channel = SimpleNamespace(follower=Reader(), open=lambda choices: 0)
                request = ObservedRequest(name, "bench", 1, options, channel)
                HUB.admit(request, Limits())
                ADDED.set([request])
            prompt = {"prompt_token_ids": [(7 * self.count + at) % 390 for at in range(PROMPT)]}
            self.engine.add_request(name, prompt, params)
        seconds = []
        while self.engine.has_unfinished_requests():
            seconds.append(self.step(out(len(seconds))))
        HUB.remove(list(HUB.admitted))
        return np.array(seconds)

    def step(self, hooks_out: bool) -> float:
        processor = type(self.engine.output_processor)
        hooked, attach = processor.process_outputs, self.seeing.attach
        if hooks_out:
            processor.process_outputs = hooked.__wrapped__
            self.seeing.attach = lambda observed, current: None
        try:
            begin = time.perf_counter()
            self.engine.step()
            return time.perf_counter() - begin
        finally:
            processor.process_outputs, self.seeing.attach = hooked, attach

    def memory(self, observed: int) -> dict:
        """MiB of the process before and after so many observed requests, and Python's objects"""
        found = {}
        for when, batches in (("before", 4), ("after", -(-observed // REQUESTS))):
            for _ in range(batches):
                self.seconds(REQUESTS)
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            found[when] = {"MiB": round(pages / 2**20, 1), "objects": len(gc.get_objects())}
        return found | {"requests": observed}
