"""Peak memory of a training step by length: attention through page masks against transformers' dense ones.

Each cell is a process of its own: forward and backward of a small Llama, the highest resident memory less that after
model and inputs were built.
"""

import argparse
import resource
from dataclasses import dataclass

import torch

from benchmarks.lib import plots
from benchmarks.lib.report import columns
from benchmarks.lib.suite import Cell, Part, Table

#: the C library returns freed memory at once: without it the peak contains what a heap happens to keep
RETURNED = (("MALLOC_MMAP_THRESHOLD_", "65536"), ("MALLOC_TRIM_THRESHOLD_", "65536"))
LENGTHS = (2048, 4096, 8192, 16384)
HEADS = 4
SHAPE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1 << 20}
#: name -> attention, mask, gradient checkpointing, longest that is tried
WAYS = {
    "dense, SDPA": ("sdpa", None, False, None),
    "dense, SDPA with a mask of pairs": ("sdpa", "pairs", False, 8192),
    "dense, eager": ("eager", None, False, 8192),
    "soft mask": ("unique", "soft", False, None),
    "hard mask": ("unique", "hard", False, None),
    "dense, SDPA, gradient checkpointing": ("sdpa", None, True, None),
    "soft mask, gradient checkpointing": ("unique", "soft", True, None),
}
COLUMNS = columns("way | attention\n" + "\n".join(f"mib_{n} | MiB at {n // 1024}k | {{:.0f}}" for n in LENGTHS))
SETTINGS = {
    "shapes": "Llama of 2 layers of 256, 4 query and 2 key heads, batch 1",
    "dtype": "float32",
    "page_size": 64,
    "budget_tokens": 1024,
    "baseline": "transformers' dense attention: SDPA, with a mask of pairs, eager",
    "counted": "highest resident memory of forward and backward less that before",
    "model": SHAPE,
}
NOTES = [
    "Forward and backward, batch 1, float32: highest resident memory less that before the step, with freed memory "
    "returned at once.",
    "dense, SDPA: torch's fused kernel, which holds no matrix either; a mask of pairs is what a soft mask over keys "
    "takes without a kernel of its own. Ways that hold the matrix are not tried beyond 8k tokens.",
]


@dataclass(frozen=True)
class Case:
    way: str
    length: int


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    made = Table("Peak memory of a training step", COLUMNS, NOTES, SETTINGS, finished, plot=plot, timed=False)
    return {"training-memory": made}


def parts(options: argparse.Namespace) -> list[Part]:
    lengths = LENGTHS[:1] if options.toy else LENGTHS
    cases = [Case(way, n) for way, (*_, most) in WAYS.items() for n in lengths if n <= (most or n)]
    made = []
    for case in cases:
        cells = (Cell(f"{case.way}, {case.length}", 0.5, case),)
        made.append(Part("memory", "training-memory", cells[0].name, cells, 0.1, vllm=False, environment=RETURNED))
    return made


def opened(part: Part, options: argparse.Namespace):
    return measure


def measure(case: Case) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    import vllm_dlm.training as sparse

    implementation, mask, checkpointing, _ = WAYS[case.way]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation=implementation).train()
    if implementation == "unique":
        sparse.configure(model, sparse.PageSparsity(budget_tokens=1024, hard=mask == "hard", dense_layers=()))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    small, ids = torch.randint(0, 512, (1, 256)), torch.randint(0, 512, (1, case.length))
    model(small, labels=small, use_cache=False).loss.backward()  # what is allocated once
    before, given = resident(), {}
    if mask == "pairs":
        later = torch.ones(case.length, case.length, dtype=torch.bool).triu(1)
        zeros = torch.zeros(1, HEADS, case.length, case.length)
        given["attention_mask"] = zeros.masked_fill_(later, -torch.inf).requires_grad_()
    model(ids, labels=ids, use_cache=False, **given).loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"way": case.way, f"mib_{case.length}": peak - before}


def resident() -> float:
    """MiB"""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def finished(rows: list[dict]) -> list[dict]:
    """One per way"""
    ways: dict[str, dict] = {}
    for row in rows:
        if "way" in row:
            ways.setdefault(row["way"], {}).update({k: v for k, v in row.items() if k == "way" or k.startswith("mib_")})
    return list(ways.values())


def plot(figure, rows: list[dict]) -> None:
    axes = figure.subplots()
    for row in rows:
        found = [(n, row[f"mib_{n}"]) for n in LENGTHS if f"mib_{n}" in row]
        style = {"color": plots.colour(row["way"]), "ls": "--" if WAYS[row["way"]][2] else "-"}
        axes.plot(*zip(*found, strict=True), marker="o", ms=4, label=row["way"], **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB")
    axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    axes.set_yticks((50, 100, 200, 500, 1000, 2000, 5000), ("50", "100", "200", "500", "1,000", "2,000", "5,000"))
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.legend(frameon=False, fontsize=8)
