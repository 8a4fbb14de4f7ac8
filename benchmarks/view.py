"""What looking at steps costs: the same batches with nobody looking, with one request observed and with all of them.

The baseline is the same engine with the hooks of vllm_dlm/view taken out of its way. Each round runs all of them, in
turn, so that a slow minute is everybody's. Then so many observed requests end, and the process is as large as before.
"""

import gc
import os
import statistics
import time
from pathlib import Path

from benchmarks import load as idle
from benchmarks import report

REQUESTS, PROMPT, NEW = 8, 64, 64
WHO = {"hooks taken out": 0, "nobody looks": 0, "one request observed": 1, "all requests observed": REQUESTS}
BASELINE = next(iter(WHO))
COLUMNS = [
    report.Column("who", "who looks"),
    report.Column("seconds", "seconds of a batch", "{:.3f}"),
    report.Column("share", "of the baseline", "{:.4f}"),
    report.Column("spread", "quarter to quarter", "{:.4f}"),
]


def add_arguments(parser) -> None:
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--observed", type=int, default=1000, help="requests after which memory is compared")
    parser.add_argument("--checkpoint", type=Path, help="default: the demo's")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    idle.add_arguments(parser)


def run(args) -> None:
    load = idle.settle(args.busy, args.patience)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    batches = Batches(args.checkpoint)
    for who in WHO:
        batches.seconds(who)  # what happens only once shall not count
    times: dict[str, list[float]] = {who: [] for who in WHO}
    with load.watch():
        for number in range(args.rounds):
            turn = list(WHO)[number % len(WHO) :] + list(WHO)[: number % len(WHO)]
            for who in turn:
                times[who].append(batches.seconds(who))
    result = report.Report(
        "view",
        "What it costs to look at steps",
        settings(args, batches)
        | report.surroundings(batches.threads, load)
        | {"memory": batches.memory(args.observed)},
        COLUMNS,
        ["Shares are medians over rounds of the time of a round over that of the baseline in the same round."],
        [row(who, times) for who in WHO],
    )
    result.print()
    result.write(args.output)


def row(who: str, times: dict[str, list[float]]) -> dict:
    shares = sorted(own / base for own, base in zip(times[who], times[BASELINE], strict=True))
    quarter = len(shares) // 4
    return {
        "who": who,
        "seconds": statistics.median(times[who]),
        "share": statistics.median(shares),
        "spread": shares[-1 - quarter] - shares[quarter],
    }


def settings(args, batches: "Batches") -> dict:
    return {
        "shapes": f"{batches.layers} layers, {REQUESTS} requests of {PROMPT} + {NEW} tokens, dllm_cache",
        "dtype": "float32",
        "baseline": f"the same engine, {BASELINE}",
        "counted": "wall time until the last of a batch has ended",
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
        self.params = SamplingParams(
            temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, extra_args={"dlm_reuse": "dllm_cache"}
        )
        core = self.engine.engine_core.engine_core
        self.seeing = core.model_executor.driver_worker.worker.model_runner.seeing
        self.layers = core.scheduler.model_shape.layers
        self.count = 0

    def seconds(self, who: str) -> float:
        processor = type(self.engine.output_processor)
        hooked, attach = processor.process_outputs, self.seeing.attach
        if who == BASELINE:
            processor.process_outputs = hooked.__wrapped__
            self.seeing.attach = lambda wanted: None
        try:
            begin = time.perf_counter()
            self.batch(WHO[who])
            return time.perf_counter() - begin
        finally:
            processor.process_outputs, self.seeing.attach = hooked, attach

    def batch(self, observed: int) -> None:
        from vllm_dlm.view.hub import HUB, Follower, Request

        class Nowhere(Follower):
            """Frames come as far as to whoever would send them on."""

            def _later(self) -> None:
                self.waiting.clear()

        for number in range(REQUESTS):
            self.count += 1
            name, params = f"bench-{self.count}", self.params
            if number < observed:
                params = params.clone()
                params.extra_args = params.extra_args | {"dlm_frames": 1}
                HUB.add(Request(name, "bench", 1, False, Nowhere(), 0))
            prompt = {"prompt_token_ids": [(7 * self.count + at) % 390 for at in range(PROMPT)]}
            self.engine.add_request(name, prompt, params)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        for request in list(HUB.requests.values()):
            HUB.remove(request)

    def memory(self, observed: int) -> dict:
        """MiB of the process before and after so many observed requests, and Python's objects"""
        found = {}
        for when, batches in (("before", 4), ("after", -(-observed // REQUESTS))):
            for _ in range(batches):
                self.batch(REQUESTS)
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            found[when] = {"MiB": round(pages / 2**20, 1), "objects": len(gc.get_objects())}
        return found | {"requests": observed}
