"""Peak memory of a training step by length: attention through page masks against transformers' dense ones.

Each cell is a process of its own: forward and backward of a small Llama, the
highest resident memory less what was there when model and inputs were built.
"""

import argparse
import json
import os
import resource
import subprocess
import sys

import torch
from tqdm import tqdm

from benchmarks import drawing, report
from benchmarks.load import Load

SHAPE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1 << 20,
}  # fmt: skip
#: the C library gives what is freed back at once: without it the peak holds what a heap happens to keep
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LENGTHS = (2048, 4096, 8192, 16384)
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
COLUMNS = [
    report.Column("way", "attention"),
    *(report.Column(f"mib_{n}", f"MiB at {n // 1024}k", "{:.0f}") for n in LENGTHS),
]
STATED = {
    "shapes": "Llama of 2 layers of 256, 4 query and 2 key heads, batch 1", "dtype": "float32", "page_size": 64,
    "budget_tokens": 1024, "baseline": "transformers' dense attention: SDPA, with a mask of pairs, eager",
    "counted": "highest resident memory of forward and backward less that before",
}  # fmt: skip
NOTES = [
    "Forward and backward, batch 1, float32: highest resident memory less that before the step, with what is freed "
    "given back at once.",
    "dense, SDPA: torch's fused kernel, which holds no matrix either; a mask of pairs is what a soft mask over keys "
    "takes without a kernel of its own. Ways that hold the matrix are not tried beyond 8k tokens.",
]


def measure(way: str, length: int) -> dict:
    from transformers import LlamaConfig, LlamaForCausalLM

    import vllm_dlm.training as sparse

    implementation, mask, checkpointing, _ = WAYS[way]
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation=implementation).train()
    if implementation == "unique":
        sparse.configure(model, sparse.PageSparsity(budget_tokens=1024, hard=mask == "hard", dense_layers=()))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    small, ids = torch.randint(0, 512, (1, 256)), torch.randint(0, 512, (1, length))
    model(small, labels=small, use_cache=False).loss.backward()  # what is allocated once
    before, given = resident(), {}
    if mask == "pairs":
        given["attention_mask"] = torch.zeros(1, SHAPE["num_attention_heads"], length, length).masked_fill_(
            torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf
        ).requires_grad_()  # fmt: skip
    model(ids, labels=ids, use_cache=False, **given).loss.backward()
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def resident() -> float:
    """MiB"""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LENGTH"), help="measure one cell and print it as JSON")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    cells = [
        (way, length) for way, (*_, most) in WAYS.items() for length in LENGTHS
        if length <= min(most or length, options.longest)
    ]  # fmt: skip
    rows, load = {way: {"way": way} for way in WAYS}, Load(timed=False)
    for way, length in tqdm(cells, unit="cell"):
        command = [
            sys.executable,
            "-m",
            "examples.training.memory",
            "--threads",
            str(options.threads),
            "--one",
            way,
            str(length),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | RETURNED)
        found = json.loads(done.stdout.splitlines()[-1])
        rows[way][f"mib_{length}"] = found["mib"]
    result = report.Report(
        "training-memory", "Peak memory of a training step",
        STATED | {"model": SHAPE} | report.surroundings(options.threads, load),
        COLUMNS, NOTES, list(rows.values()),
    )  # fmt: skip
    result.print()
    for path in result.write(plot=plot):
        print(path)


def plot(figure, rows: list[dict]) -> None:
    axes = figure.subplots()
    for row in rows:
        found = [(n, row[f"mib_{n}"]) for n in LENGTHS if f"mib_{n}" in row]
        style = {"color": drawing.colour(row["way"]), "ls": "--" if WAYS[row["way"]][2] else "-"}
        axes.plot(*zip(*found, strict=True), marker="o", ms=4, label=row["way"], **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB")
    axes.set_xticks(LENGTHS, [f"{n // 1024}k" for n in LENGTHS])
    axes.set_yticks((50, 100, 200, 500, 1000, 2000, 5000), ("50", "100", "200", "500", "1,000", "2,000", "5,000"))
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
