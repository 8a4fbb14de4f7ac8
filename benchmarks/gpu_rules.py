"""The table of decodings and extents on a GPU: how long texts of the demo checkpoint take in a large model's shape."""

import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import enlarged, report, speed_rules
from benchmarks.gpu_engine import memory
from benchmarks.gpu_parts import Cell, Part
from benchmarks.gpu_shapes import SHAPES, Peaks

TITLE = "Speed of decodings and extents on long canvases"
COLUMNS = [
    *(column for column in speed_rules.COLUMNS if column.key != "others"),
    report.Column("ms_per_forward", "ms/forward", "{:.1f}"),
    report.Column("failed", "failed"),
]
SETTINGS = {
    "dtype": "bfloat16",
    "weights": "the demo checkpoint inside of the large model: its texts at the large one's cost "
    "(benchmarks/enlarged.py)",
    "decoding": f"prompts of {speed_rules.PROMPT} tokens, {speed_rules.NEW} new ones, canvas blocks of "
    f"{speed_rules.BLOCK}",
    "baseline": "fast_dllm on a full canvas: one token a step, or with the threshold",
    "counted": "response tokens delivered",
}  # fmt: skip
NOTES = [
    *speed_rules.NOTES[:2],
    "Forwards and texts are the small model's, so what a rule saves with a trained model of this shape is another "
    "matter; what its forwards cost is not.",
    "same texts: in bfloat16 a step of other rows rounds otherwise, and a text may part where two tokens are as "
    "probable.",
]


@dataclass(frozen=True)
class Engine:
    shape: str
    requests: int
    prompt: int = speed_rules.PROMPT
    new: int = speed_rules.NEW


@dataclass(frozen=True)
class Rule:
    method: speed_rules.Method
    requests: int


class Running(NamedTuple):
    """As speed_rules.measure has it."""

    llm: object
    runner: object


def started(engine: Engine) -> Running:
    from vllm import LLM

    from benchmarks.quality import CHECKPOINT
    from tests.soak.engines import runner_of

    shape, length = SHAPES[engine.shape], engine.prompt + engine.new
    enlarged.register(CHECKPOINT, shape)
    folder = enlarged.folder_of(CHECKPOINT, shape, Path(tempfile.mkdtemp()), length)
    llm = LLM(
        str(folder), load_format=enlarged.LOAD_FORMAT, dtype="bfloat16", max_model_len=length,
        max_num_seqs=engine.requests, max_num_batched_tokens=engine.requests * length, skip_tokenizer_init=True,
        disable_log_stats=True, use_tqdm_on_load=False, **memory(),
    )  # fmt: skip
    return Running(llm, runner_of(llm))


def opened(part: Part, peaks: Peaks):
    engine: Engine = part.engine
    running, samples = started(engine), speed_rules.samples(engine.requests, engine.prompt)

    def measure(cell: Cell) -> dict:
        own: Rule = cell.what
        row = speed_rules.measure(running, own.method, own.requests, samples, new=engine.new)
        # The requests begin and, nearly, end together: a forward of all of them is one of each.
        seconds = own.requests * engine.new / row["tokens_per_s"]
        row["texts"] = [zlib.crc32(str(text).encode()) for text in row["texts"]]  # to be compared, in few bytes
        return {"shape": engine.shape} | row | {"ms_per_forward": 1e3 * seconds / row["forwards"]}

    return measure


def finished(rows: list[dict]) -> list[dict]:
    measured = [row for row in rows if "tokens_per_s" in row]
    known = {row["cell"]: row for row in speed_rules.finished(measured)}
    return [row | known.get(row["cell"], {}) for row in rows]


def bars(rows: list[dict]) -> list[str]:
    told = []
    drafts = [row for row in rows if row.get("method", "").startswith("freedave") and row["requests"] == 1]
    if ratios := [row["ratio"] for row in drafts if "ratio" in row]:
        told.append(f"Bar: drafts at least 1.8 times one token a step, one request: {max(ratios):.2f} times.")
    windows = [row for row in rows if "window" in row.get("method", "") and "ratio" in row]
    if windows:
        told.append(
            "Bar: the window upon fast_dllm with a threshold at least twice as fast: "
            f"{max(row['ratio'] for row in windows):.2f} times at most."
        )
    return told


def plot(figure, rows: list[dict]) -> None:
    if measured := [row for row in rows if "tokens_per_s" in row]:
        speed_rules.plot(figure, measured)
