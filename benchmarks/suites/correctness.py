"""What is right on a device: kernels against their definitions, steps replayed from CUDA graphs against launched ones,
page-sparse decoding with a budget of all pages against vLLM, and tests of the engine that hold on any device."""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.lib import kernel_cases, plots
from benchmarks.lib.device import device
from benchmarks.lib.kernel_case import KernelCase
from benchmarks.lib.process import shortened
from benchmarks.lib.report import ROOT, columns
from benchmarks.lib.suite import Cell, Part, Table
from benchmarks.lib.workloads import compare

GOLDEN = ROOT / "tests" / "golden" / "checkpoints"
COLUMNS = columns(
    """
    kind | kind
    what | what
    by | by
    cases | cases
    right | right
    error | largest error / tolerance | {:.2g}
    agreement | equal tokens | {:.1%}
    first | first that is not
    failed | failed
    """
)
SETTINGS = {
    "shapes": "small ones, and the tiny checkpoints of tests/golden",
    "dtype": "each in float32, kernels and graphs in half precision, too",
    "baseline": "each kernel's definition in float64; the engine without graphs; vLLM's dense attention; recorded runs",
    "counted": "cases; texts that are equal token for token",
}
NOTES = [
    "Tolerances of kernels: 1e-4 in float32, 4e-3 in float16, 3e-2 in bfloat16, absolute and relative; top_pages must "
    "be equal.",
    "graphs, bfloat16: other shapes of the same product round differently, so texts diverge where two tokens are "
    "nearly equally probable; equal tokens says how many are the same.",
    "page-sparse: a small float32 model with a budget of all pages. With one of 256 tokens some text must differ.",
    "recorded runs, rules, batches and servers: tests that hold on any device, each file in its own process.",
]
#: recorded runs first, then batches against requests alone, everything registered, frames, servers
TESTS = (
    *("golden", "reuse_golden", "rules_golden", "block_causal", "block_selection", "llada_moe", "shadow", "extent"),
    *("drafts", "prefixes", "scoring", "templates", "infill", "matrix", "view"),
)
SERVER_TESTS = ("server", "server_infill", "server_score", "server_view", "server_templates", "server_drafts")
POLICIES = ("none", "fast_dllm/prefix", "fast_dllm/dual", "dllm_cache", "dyllm")


@dataclass(frozen=True)
class Kernel:
    name: str


@dataclass(frozen=True)
class TestFile:
    path: str  # in tests/


@dataclass(frozen=True)
class Graphs:
    checkpoint: str
    dtype: str
    policies: tuple[str, ...] = POLICIES
    prompts: tuple[int, ...] = (13, 40, 97)
    new: int = 32
    decodings: bool = False  # every registered one, on the whole canvas and on a window


@dataclass(frozen=True)
class AllPages:
    texts: int = 8
    context: int = 1024
    new: int = 65


def tables(options: argparse.Namespace | None = None) -> dict[str, Table]:
    made = Table("Correctness", COLUMNS, NOTES, SETTINGS, finished, bars, plot, timed=False)
    return {"gpu-correctness": made, "correctness": made}


def parts(options: argparse.Namespace) -> list[Part]:
    table = "gpu-correctness" if options.device == "cuda" else "correctness"

    def part(name: str, cells: list[tuple], start: float, rank: int | None) -> Part:
        made = tuple(Cell(*cell) for cell in cells)
        return Part("correctness", table, name, made, start, rank=rank, vllm=name != "kernels")

    def graphs(*wanted: Graphs) -> list[tuple]:
        return [
            (f"{one.checkpoint} {one.dtype}" + ", decodings" * one.decodings, 0.8 if one.decodings else 0.3, one)
            for one in wanted
        ]

    def tests(names, folder: str) -> list[tuple]:
        return [(f"tests {folder}/test_{name}.py", 1.0, TestFile(f"{folder}/test_{name}.py")) for name in names]

    kernels = part("kernels", [(f"kernel {name}", 0.03, Kernel(name)) for name in kernel_cases.folders()], 0.2, 1)
    pages = part("all pages", [("all pages", 0.5, AllPages())], 0.3, 9 if options.device == "cuda" else None)
    if options.toy:
        small = Graphs("llada-tiny", "float32", ("none", "fast_dllm/dual"), (13,), 8)
        return [kernels, part("graphs", graphs(small), 0.2, 5), pages]
    if options.device == "cpu":
        return [kernels, pages, part("tests", tests(TESTS, "engine") + tests(SERVER_TESTS, "integration"), 0.1, None)]
    tiny, half = ("llada-tiny", "dream-tiny"), "bfloat16"
    blocks = [Graphs(name, half, ("none",)) for name in ("sdar-tiny", "llada2-tiny")]
    return [
        kernels,
        part("recorded runs", tests(TESTS[:2], "engine"), 0.3, 4),
        part("graphs", graphs(*(Graphs(name, dtype) for dtype in ("float32", half) for name in tiny)), 0.3, 5),
        part("graphs of blocks and experts", graphs(*blocks, Graphs("lladamoe-tiny", half)), 0.3, 6),
        part(
            "graphs of decodings", graphs(*(Graphs(name, half, POLICIES[2:], decodings=True) for name in tiny)), 0.3, 7
        ),
        part("tests on CUDA", [("tests on CUDA", 1.0, TestFile("kernels/test_on_cuda.py"))], 0.1, 9),
        part("tests", tests(TESTS[2:], "engine") + tests(SERVER_TESTS, "integration"), 0.1, 9),
        pages,
    ]


def opened(part: Part, options: argparse.Namespace) -> Callable:
    measure = {Kernel: kernel, TestFile: tests, Graphs: graphs, AllPages: all_pages}
    return lambda work: measure[type(work)](work)


# -- kernels -----------------------------------------------------------------------------------------------------------


def kernel(wanted: Kernel) -> dict:
    here = device()
    row = {"kind": "kernel", "what": wanted.name, "by": kernel_cases.implementation(wanted.name, here)}
    if wanted.name not in kernel_cases.CASES:
        raise NotImplementedError(f"benchmarks/lib/kernel_cases.py has no cases of {wanted.name}")
    errors = {case.name: error_of(case) for case in kernel_cases.cases(wanted.name, here)}
    wrong = [name for name, error in errors.items() if not error <= 1]
    row |= {"cases": len(errors), "right": len(errors) - len(wrong), "error": max(errors.values(), default=None)}
    return row | {"first": wrong[0] if wrong else None if errors else "does not run here"}


def error_of(case: KernelCase) -> float:
    """The largest error as a share of the tolerance; NaN and infinities must be the same."""
    got, want = case.got.double(), case.want.double()
    if got.shape != want.shape or got.numel() == 0:
        return 0.0 if got.shape == want.shape else torch.inf
    same = (got == want) | (got.isnan() & want.isnan())
    if not case.tolerance:
        return 0.0 if same.all() else torch.inf
    share = (got - want).abs() / (case.tolerance * (1 + want.abs()))
    return float(torch.where(same, 0.0, share.nan_to_num(nan=torch.inf)).max())


# -- engines -----------------------------------------------------------------------------------------------------------


@cache
def engine(checkpoint: str, dtype: str, eager: bool):
    """Kept: shutting one down would end torch.distributed for the whole process."""
    from benchmarks.lib.engines import start

    sizes = {"max_model_len": 256, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 27}
    return start(GOLDEN / checkpoint, share=0.05, dtype=dtype, enforce_eager=eager, **sizes)


def graphs(wanted: Graphs) -> dict:
    """Requests alone and in one batch, with CUDA graphs and without"""
    from benchmarks.lib.engines import generate, random_prompts, sampling

    asked = decodings(wanted) if wanted.decodings else policies(wanted)
    prompts = random_prompts(380, [length for _, length in asked.values()], 0)
    blocks = [{"dlm_block_length": 8} | options for options, _ in asked.values()]
    params = [sampling(wanted.new, options, seed=0, ignore_eos=True) for options in blocks]
    both = []
    for eager in (False, True):
        llm = engine(wanted.checkpoint, wanted.dtype, eager)
        alone = [generate(llm, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
        both.append(alone + generate(llm, prompts, params))
    names = [f"{name}, {how}" for how in ("alone", "in a batch") for name in asked]
    what = wanted.checkpoint + ", decodings" * wanted.decodings
    return {"kind": "graphs", "what": what, "by": wanted.dtype} | compare(names, *both)


def policies(wanted: Graphs) -> dict[str, tuple[dict, int]]:
    """name -> options, prompt tokens"""
    return {
        f"{policy}, {length} prompt tokens": ({"dlm_reuse": policy}, length)
        for policy in wanted.policies
        for length in wanted.prompts
    }


def decodings(wanted: Graphs) -> dict[str, tuple[dict, int]]:
    from benchmarks.suites.answers import rules

    return {
        f"{rule.label}, {reuse}{', window' * bool(window)}": (
            rule.options_of(wanted.new) | {"dlm_reuse": reuse} | ({"dlm_window": window} if window else {}),
            40,
        )
        for rule in rules()
        for reuse in wanted.policies
        for window in (0, 8)
    }


def all_pages(wanted: AllPages) -> dict:
    """In float32, where rounding decides nothing"""
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.lib.engines import decode, start
    from benchmarks.lib.models import SHAPES

    texts, kept = {}, []  # shutting an engine down would end torch.distributed for the next one
    with tempfile.TemporaryDirectory() as place:
        folder = SHAPES["toy-llama"].folder(Path(place), 2048)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().save_pretrained(folder)
        for name, budget in (("dense", None), ("all pages", 1 << 20), ("256 tokens", 256)):
            selection = {"name": "unique", "page_size": 32, "budget_tokens": budget, "min_context": 0}
            own = {"additional_config": {"dlm": {"selection": selection}}} if budget else {}
            sizes = {"max_model_len": 2048, "max_num_seqs": 1}
            llm = start(folder, share=0.05, dtype="float32", enforce_eager=True, **sizes, **own)
            kept.append(llm)
            prompts = [[(i * 31 + seed * 7) % 511 for i in range(wanted.context)] for seed in range(wanted.texts)]
            texts[name] = [decode(llm, [prompt], wanted.new)[1][0] for prompt in prompts]
    row = compare([f"text {index}" for index in range(wanted.texts)], texts["all pages"], texts["dense"])
    differing = sum(one != other for one, other in zip(texts["256 tokens"], texts["dense"], strict=True))
    if not differing:
        row |= {"right": 0, "first": "a budget of 256 tokens changes nothing: pages are not chosen"}
    return {"kind": "page-sparse", "what": f"all pages; {differing} texts differ at 256 tokens", "by": "float32"} | row


# -- tests -------------------------------------------------------------------------------------------------------------


def tests(wanted: TestFile) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report.name}"]
        subprocess.run([*command, f"tests/{wanted.path}"], cwd=ROOT, capture_output=True)
        found = outcomes(Path(report.name).read_text())
    wrong = [f"{name}: {message}" for name, message in found.items() if message]
    row = {"kind": "tests", "what": wanted.path, "by": "float32", "cases": len(found)}
    return row | {"right": len(found) - len(wrong), "first": wrong[0] if wrong else None}


def outcomes(junit: str) -> dict[str, str]:
    """Tests that ran -> "", or the message of the failure: there may be no second run on that machine"""
    found = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        if case.find("skipped") is None:
            wrong = [part for kind in ("failure", "error") if (part := case.find(kind)) is not None]
            found[case.attrib["name"]] = shortened(wrong[0].attrib.get("message", "failed"), 300) if wrong else ""
    return found


# -- the table ---------------------------------------------------------------------------------------------------------


def finished(rows: list[dict]) -> list[dict]:
    kinds = ["kernel", "recorded runs", "graphs", "page-sparse", "tests"]
    return sorted(rows, key=lambda row: kinds.index(row["kind"]) if row.get("kind") in kinds else len(kinds))


def bars(rows: list[dict]) -> list[str]:
    exact = [row for row in rows if "cases" in row and (row["kind"], row["by"]) != ("graphs", "bfloat16")]
    right, cases = (sum(row[key] for row in exact) for key in ("right", "cases"))
    return [f"Bar: {right} of {cases} cases that must be right are."] if exact else []


def plot(figure, rows: list[dict]) -> None:
    """How much of its tolerance each kernel takes, and the share of texts that are equal"""
    kernels = [row for row in rows if row.get("error") is not None and row["error"] < torch.inf]
    runs = [row for row in rows if "agreement" in row]
    grid = figure.subplots(1, max(1, bool(kernels) + bool(runs)), squeeze=False)[0]
    if kernels:
        names, errors = [row["what"] for row in kernels], [row["error"] for row in kernels]
        plots.dots(grid[0], names, errors, "largest error / tolerance", "{:.2g}", log=True)
    if runs:
        names = [f"{row['what'].partition('_p40')[0].partition(';')[0]}\n{row['kind']}, {row['by']}" for row in runs]
        figure.set_figheight(max(figure.get_figheight(), 1.2 + 0.33 * len(names)))
        plots.dots(grid[-1], names, [row["right"] / row["cases"] for row in runs], "texts that are equal", "{:.0%}")
        grid[-1].set_xlim(0, 1.25)
        grid[-1].set_xticks([0, 0.5, 1])
