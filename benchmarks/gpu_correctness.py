"""The table of what is right on a GPU: kernels against their definitions, recorded runs of the published code through
the engine, the engine with CUDA graphs against itself without, and tests of the engine that run on any device."""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks import drawing, gpu_cases, report
from benchmarks.gpu_case import Case
from benchmarks.gpu_device import device
from benchmarks.gpu_parts import Cell, Part, shortened
from benchmarks.gpu_shapes import Peaks

ROOT = Path(__file__).resolve().parents[1]

TITLE = "Correctness"
COLUMNS = [
    report.Column("kind", "kind"),
    report.Column("what", "what"),
    report.Column("by", "by"),
    report.Column("cases", "cases"),
    report.Column("right", "right"),
    report.Column("error", "largest error / tolerance", "{:.2g}"),
    report.Column("agreement", "equal tokens", "{:.1%}"),
    report.Column("first", "first that is not"),
    report.Column("failed", "failed"),
]
SETTINGS = {
    "shapes": "small ones, and the tiny checkpoints of tests/golden",
    "dtype": "each in float32, kernels and graphs in half precision, too",
    "baseline": "each kernel's definition in float64; texts recorded from published code; the engine without graphs",
    "counted": "cases, of texts: those that are equal token for token",
}
NOTES = [
    "Tolerances of kernels: 1e-4 in float32, 4e-3 in float16, 3e-2 in bfloat16, absolute and relative; top_pages must "
    "be equal.",
    "graphs, bfloat16: other shapes of the same product round otherwise, so that texts part where two tokens are as "
    "good as equally probable; equal tokens says how many are the same.",
]
#: recorded runs of dLLM-Cache and DyLLM, whose options belong to a server
REUSE = (
    "dc_llada-tiny_p40g32b8_kp50_kr7_r025", "dy_llada-tiny_p40g32b8_tau0.995_f4",
    "dc_llada-calm_p40g32b8_kp8_kr4_r025", "dy_llada-calm_p40g32b8_tau0.99_f4",
)  # fmt: skip
#: what holds on any device: recorded runs of decodings and of models that know blocks, batches and requests alone, all
#: that is registered in one batch, what is told of steps, a server
TESTS = (
    "kernels/test_on_cuda.py", "engine/test_matrix.py", "engine/test_view.py", "engine/test_block_selection.py",
    "engine/test_block_causal.py", "engine/test_llada_moe.py", "engine/test_rules_golden.py",
    "engine/test_golden.py", "engine/test_shadow.py", "engine/test_reuse_golden.py", "engine/test_extent.py",
    "engine/test_drafts.py", "engine/test_prefixes.py", "engine/test_scoring.py", "engine/test_templates.py",
    "engine/test_infill.py", "integration/test_server.py", "integration/test_server_infill.py",
    "integration/test_server_score.py", "integration/test_server_view.py", "integration/test_server_templates.py",
    "integration/test_server_drafts.py",
)  # fmt: skip
POLICIES = ("none", "fast_dllm/prefix", "fast_dllm/dual", "dllm_cache", "dyllm")


@dataclass(frozen=True)
class Kernel:
    name: str


@dataclass(frozen=True)
class Golden:
    checkpoint: str


@dataclass(frozen=True)
class GoldenReuse:
    run: str


@dataclass(frozen=True)
class Tests:
    file: str  # under tests/


@dataclass(frozen=True)
class Graphs:
    checkpoint: str
    dtype: str
    policies: tuple[str, ...] = POLICIES
    prompts: tuple[int, ...] = (13, 40, 97)
    new: int = 32


@dataclass(frozen=True)
class RulesInGraphs:
    checkpoint: str
    dtype: str
    reuses: tuple[str, ...] = ("fast_dllm/dual", "dllm_cache", "dyllm")
    new: int = 32


def opened(part: Part, peaks: Peaks) -> Callable[[Cell], dict]:
    return lambda cell: MEASURED[type(cell.what)](cell.what)


def kernel(wanted: Kernel) -> dict:
    here = device()
    row = {"kind": "kernel", "what": wanted.name, "by": gpu_cases.implementation(wanted.name, here)}
    if wanted.name not in gpu_cases.CASES:
        raise NotImplementedError(f"benchmarks/gpu_cases.py has no cases of {wanted.name}")
    errors = {case.name: error_of(case) for case in gpu_cases.cases(wanted.name, here)}
    wrong = [name for name, error in errors.items() if not error <= 1]
    return row | {
        "cases": len(errors), "right": len(errors) - len(wrong), "error": max(errors.values(), default=None),
        "first": wrong[0] if wrong else None if errors else "nothing here runs it",
    }  # fmt: skip


def error_of(case: Case) -> float:
    """The largest error as a share of what is tolerated; NaN and infinities must be the same."""
    got, want = case.got.double(), case.want.double()
    if got.shape != want.shape or got.numel() == 0:
        return 0.0 if got.shape == want.shape else torch.inf
    same = (got == want) | (got.isnan() & want.isnan())
    if not case.tolerance:
        return 0.0 if same.all() else torch.inf
    share = (got - want).abs() / (case.tolerance * (1 + want.abs()))
    return float(torch.where(same, 0.0, share.nan_to_num(nan=torch.inf)).max())


@cache
def engine(checkpoint: str, dtype: str, eager: bool, reuse: str = "null"):
    """Kept: taking one down would end torch.distributed for all of the process."""
    from vllm import LLM

    from tests.conftest import GOLDEN

    folder = GOLDEN / "checkpoints" / checkpoint
    return LLM(
        str(folder), skip_tokenizer_init=not (folder / "tokenizer_config.json").exists(), dtype=dtype,
        max_model_len=256, enforce_eager=eager,
        kv_cache_memory_bytes=1 << 27, gpu_memory_utilization=0.05, max_num_seqs=64, disable_log_stats=True,
        use_tqdm_on_load=False,
        additional_config={"dlm": {"reuse": json.loads(reuse)} if reuse != "null" else {}},
    )  # fmt: skip


def texts(llm, requests: list[tuple[dict, object]]) -> list[list[int]]:
    prompts, params = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare(names: list[str], got: list[list[int]], want: list[list[int]]) -> dict:
    wrong = [triple for triple in zip(names, got, want, strict=True) if triple[1] != triple[2]]
    pairs = [pair for one, other in zip(got, want, strict=True) for pair in zip(one, other, strict=False)]
    found = {
        "cases": len(names),
        "right": len(names) - len(wrong),
        "agreement": sum(a == b for a, b in pairs) / len(pairs),
    }
    return found | {"first": difference(*wrong[0]) if wrong else None}


def difference(name: str, got: list[int], want: list[int]) -> str:
    for at, (mine, theirs) in enumerate(zip(got, want, strict=False)):
        if mine != theirs:
            return f"{name}: token {at} is {mine} and not {theirs}"
    return f"{name}: {len(got)} tokens instead of {len(want)}"


def golden(wanted: Golden) -> dict:
    """Greedy runs without caches, and those of Fast-dLLM, in one batch."""
    from tests.conftest import GOLDEN
    from tests.engine.test_golden import CASES, requests_of
    from tests.engine.test_reuse_golden import FAST

    runs = json.loads((GOLDEN / "runs.json").read_text())["runs"]
    plain = [name for checkpoint, names in CASES if checkpoint == wanted.checkpoint for name in names]
    rows = [(name, *row) for name in plain for row in requests_of(name, runs[name])]
    for name in (name for name in FAST if runs[name]["model"] == wanted.checkpoint):
        for prompt, params, expected in requests_of(name, runs[name]):
            params.extra_args["dlm_reuse"] = f"fast_dllm/{FAST[name]['cache']}"
            if wanted.checkpoint.startswith("dream"):
                params.extra_args["dlm_algorithm"] = "maskgit_plus"
            rows.append((name, prompt, params, expected))
    got = texts(engine(wanted.checkpoint, "float32", False), [row[1:3] for row in rows])
    found = compare([row[0] for row in rows], got, [row[3] for row in rows])
    return {"kind": "recorded runs", "what": wanted.checkpoint, "by": "float32"} | found


def golden_reuse(wanted: GoldenReuse) -> dict:
    from safetensors.torch import load_file
    from vllm import SamplingParams

    from tests.conftest import GOLDEN
    from tests.engine.test_reuse_golden import RUNS, policy, prompts_of

    (run,) = [run for run in RUNS if run["file"] == f"{wanted.run}.safetensors"]
    tensors = load_file(GOLDEN / "reuse" / run["file"])
    llm = engine(run["checkpoint"], "float32", False, json.dumps(policy(run)))
    params = SamplingParams(
        temperature=0, max_tokens=run["gen_len"], ignore_eos=True, detokenize=False,
        extra_args={"dlm_block_length": run["block"], "dlm_steps": run["steps"]},
    )  # fmt: skip
    prefixes = prompts_of(tensors)
    requests = [({"prompt_token_ids": tensors[f"{prefix}prompt_ids"].tolist()}, params) for prefix in prefixes]
    want = [tensors[f"{prefix}final_ids"].tolist() for prefix in prefixes]
    found = compare([wanted.run] * len(want), texts(llm, requests), want)
    return {"kind": "recorded runs", "what": wanted.run, "by": "float32"} | found


def graphs(wanted: Graphs) -> dict:
    """Every policy, alone and side by side, with CUDA graphs and without."""
    asked = {
        f"{policy}, {length} prompt tokens": ({"dlm_reuse": policy}, length)
        for policy in wanted.policies for length in wanted.prompts
    }  # fmt: skip
    return {"kind": "graphs", "what": wanted.checkpoint} | replayed(wanted, asked)


def rules_in_graphs(wanted: RulesInGraphs) -> dict:
    """Every registered decoding on the whole canvas and on a window, likewise."""
    from benchmarks import quality_rules

    asked = {
        f"{rule.label}, {reuse}{', window' * bool(window)}": (
            rule.asked(wanted.new) | {"dlm_reuse": reuse} | ({"dlm_window": window} if window else {}), 40
        )
        for rule in quality_rules.rules() for reuse in wanted.reuses for window in (0, 8)
    }  # fmt: skip
    return {"kind": "graphs", "what": f"{wanted.checkpoint}, decodings"} | replayed(wanted, asked)


def replayed(wanted: Graphs | RulesInGraphs, asked: dict[str, tuple[dict, int]]) -> dict:
    """Requests with such options and so many prompt tokens"""
    from vllm import SamplingParams

    draw, requests = torch.Generator().manual_seed(0), []
    for options, length in asked.values():
        params = SamplingParams(
            temperature=0, seed=0, max_tokens=wanted.new, ignore_eos=True, detokenize=False,
            extra_args={"dlm_block_length": 8} | options,
        )  # fmt: skip
        requests.append(({"prompt_token_ids": torch.randint(0, 380, (length,), generator=draw).tolist()}, params))
    with_graphs, without = (engine(wanted.checkpoint, wanted.dtype, eager) for eager in (False, True))
    both = [
        [text for request in requests for text in texts(llm, [request])] + texts(llm, requests)
        for llm in (with_graphs, without)
    ]
    names = [f"{name}, alone" for name in asked] + [f"{name}, in a batch" for name in asked]
    return {"by": wanted.dtype} | compare(names, *both)


def tests(wanted: Tests) -> dict:
    """In a process of their own, which ends with their engines."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report_file:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report_file.name}"]
        subprocess.run([*command, f"tests/{wanted.file}"], cwd=ROOT, capture_output=True)
        found = outcomes(Path(report_file.name).read_text())
    wrong = [f"{name}: {said}" for name, said in found.items() if said]
    row = {"kind": "tests", "what": wanted.file, "by": "float32", "cases": len(found)}
    return row | {"right": len(found) - len(wrong), "first": wrong[0] if wrong else None}


def outcomes(junit: str) -> dict[str, str]:
    """Tests of a report that ran, and what those that failed say: whoever reads it may have no second try"""
    found = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        if case.find("skipped") is None:
            wrong = [part for kind in ("failure", "error") if (part := case.find(kind)) is not None]
            found[case.attrib["name"]] = shortened(wrong[0].attrib.get("message", "failed"), 300) if wrong else ""
    return found


MEASURED: dict[type, Callable] = {
    Kernel: kernel, Golden: golden, GoldenReuse: golden_reuse, Graphs: graphs, RulesInGraphs: rules_in_graphs,
    Tests: tests,
}  # fmt: skip


def finished(rows: list[dict]) -> list[dict]:
    kinds = ["kernel", "recorded runs", "graphs", "tests"]
    return sorted(rows, key=lambda row: kinds.index(row["kind"]) if row.get("kind") in kinds else len(kinds))


def bars(rows: list[dict]) -> list[str]:
    exact = [row for row in rows if "cases" in row and (row["kind"], row["by"]) != ("graphs", "bfloat16")]
    told = f"{sum(row['right'] for row in exact)} of {sum(row['cases'] for row in exact)} cases that must be right are"
    return [f"Bar: {told}."] if exact else []


def plot(figure, rows: list[dict]) -> None:
    """How much of its tolerance each kernel takes, and the share of texts that are equal."""
    kernels = [row for row in rows if row.get("error") is not None and row["error"] < torch.inf]
    runs = [row for row in rows if "agreement" in row]
    panels = [one for one in ("kernels" if kernels else "", "runs" if runs else "") if one]
    grid = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=False):
        if panel == "kernels":
            names = [row["what"] for row in kernels]
            drawing.dots(
                axes, names, [row["error"] for row in kernels], "largest error / tolerance", "{:.2g}", log=True
            )
        else:
            names = [f"{row['what'].partition('_p40')[0]}\n{row['kind']}, {row['by']}" for row in runs]
            figure.set_figheight(max(figure.get_figheight(), 1.2 + 0.33 * len(names)))
            drawing.dots(axes, names, [row["right"] / row["cases"] for row in runs], "texts that are equal", "{:.0%}")
            axes.set_xlim(0, 1.25)
            axes.set_xticks([0, 0.5, 1])
