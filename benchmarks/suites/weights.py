"""Speed with quantized weights against bfloat16 in the same run: int8 (W8A8) on a CPU, fp8 per channel on a GPU."""

import argparse

import torch

from benchmarks.lib.models import SHAPES, Shape
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.suites import speed, speed_table
from benchmarks.suites.speed import Case, EngineSpec

POLICY = "fast_dllm/dual"
METHODS = {"cpu": ("bfloat16", "int8"), "cuda": ("bfloat16", "fp8_per_channel")}
#: shape -> (prompt, requests, new tokens)
CELLS = {
    "cpu": {
        "llada-proportions": [(1024, 1, 128), (1024, 8, 64), (256, 1, 128)],
        "llada-wide": [(1024, 1, 64), (256, 1, 64)],
    },
    "cuda": {"llada-8b": [(1024, count, 64) for count in (1, 8, 32)]},
}
TOY = {"toy-llada": [(48, 1, 32), (48, 2, 32)]}
COLUMNS = columns(
    """
    shape | checkpoint
    method | weights
    prompt | prompt
    new | new
    requests | requests
    tokens_per_s | tokens/s | {:,.2f}
    vs_bfloat16 | × bfloat16 | {:.2f}
    ms_per_step | ms/step | {:.1f}
    median_ms | median step, ms | {:.2f}
    forward_ms | forward, ms | {:.2f}
    head_ms | head, ms | {:.2f}
    host_ms | rest, ms | {:.2f}
    others | cores of others | {:.2f}
    failed | failed
    """
)
NOTES = [
    f"Reuse policy {POLICY}, one token per step. int8: compressed-tensors W8A8, one scale per output channel and one "
    "dynamic scale per row of activations. fp8_per_channel: vLLM's online quantization of the bfloat16 checkpoint.",
    "Layers are quantized, embedding and head are not. forward: from the packing of a step's rows to the last layer.",
]


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    shapes = {name: SHAPES[name].describe() for name in cells_of(options)} if options else {}
    about = {"shapes": shapes} | speed_table.SETTINGS | {"baseline": "bfloat16 weights in the same run"}
    title = "Speed with quantized weights"
    return {name: Table(title, COLUMNS, NOTES, about, finished) for name in ("speed-weights", "gpu-weights")}


def cells_of(options: argparse.Namespace) -> dict[str, list[tuple[int, int, int]]]:
    return TOY if options.toy else CELLS[options.device]


def parts(options: argparse.Namespace) -> list[Part]:
    table = "gpu-weights" if options.device == "cuda" else "speed-weights"
    made = []
    for name, cells in cells_of(options).items():
        shape = SHAPES[name]
        cases = tuple(Case(POLICY, prompt, count, new, ragged=count > 1) for prompt, count, new in cells)
        for method in methods(options.device):
            own = tuple(Cell(f"{method} {speed.cell_name(shape, case)}", minutes(shape, case), case) for case in cases)
            made.append(Part("weights", table, f"{name}, {method}", own, 0.5, EngineSpec(name, cases, weights=method)))
    return made


def methods(device: str) -> tuple[str, ...]:
    """int8 is refused on CPUs without VNNI, where vLLM's products overflow."""
    int8 = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return METHODS[device] if device == "cuda" or int8 else METHODS[device][:1]


def minutes(shape: Shape, case: Case) -> float:
    return speed.minutes_of(shape, case) if shape.parameters < 1e9 else 0.2


def opened(part: Part, options: argparse.Namespace):
    method = part.engine.weights
    online = method if method.startswith("fp8") else None
    measure = speed.opened(part, argparse.Namespace(**vars(options) | {"model": None, "quantization": online}))
    return lambda case: measure(case) | {"method": method}


def finished(rows: list[dict]) -> list[dict]:
    """Each next to bfloat16"""
    plain = {place(row): row for row in rows if row.get("method") == "bfloat16"}
    for row in rows:
        if "tokens_per_s" in row and (base := plain.get(place(row))):
            row["vs_bfloat16"] = row["tokens_per_s"] / base["tokens_per_s"]
    shapes = list(SHAPES)
    return sorted(rows, key=lambda row: (shapes.index(row["shape"]), *place(row)[1:]) if "shape" in row else (99,))


def place(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("shape", "prompt", "requests"))
