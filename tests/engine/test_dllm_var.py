"""dLLM-Var: recorded runs of the official code, token for token, and row for row."""

import json

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from benchmarks.lib.models import SHAPES
from tests.conftest import GOLDEN
from tests.docs.pages import ROOT
from tests.engine.running import Watching, tokens
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.canvas import Canvas
from vllm_dlm.families import FAMILIES
from vllm_dlm.options import server_options
from vllm_dlm.plugins.reuse.base import RowShape

RUNS = json.loads((GOLDEN / "rules2/runs.json").read_text())["runs"]
#: released weights do not support that every token is replaced in every forward, and it is not served
NAMES = [name for name, run in RUNS.items() if run["method"] == "dllm_var" and not run["enable_editing"]]
METHODS = {"reuse": {"name": "frozen"}, "extent": {"name": "block"}}


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "rules2/runs" / f"{name}.safetensors")


class Fed(Watching):
    """First row and canvas of each step of the one request"""

    def __enter__(self):
        self.steps = []
        return super().__enter__()

    def step_begins(self, states):
        (state,) = states
        canvas = state.canvas
        self.steps.append((int(canvas.plan.live[0]), canvas.tokens[: canvas.plan.live[-1] + 1].tolist()))


@pytest.mark.parametrize("name", NAMES)
def test_recorded_run(engines, name):
    run, arrays = RUNS[name], recorded(name)
    answer = arrays["final"].tolist()
    params = SamplingParams(
        temperature=0,
        max_tokens=len(answer) if run["ended_by_eos"] else run["G"] // run["block"] * run["block"],
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_block_length": run["block"], "dlm_threshold": run["threshold"]},
        stop_token_ids=[run["eos_id"]] if run["ended_by_eos"] else None,
    )
    llm = engines(run["model"], additional_config={"dlm": METHODS})
    with Fed(llm) as fed:
        (got,) = tokens(llm, [({"prompt_token_ids": arrays["prompt"].tolist()}, params)])
    end = answer.index(run["eos_id"]) + 1 if run["ended_by_eos"] else len(answer)
    assert list(got) == answer[:end]
    lengths, rows = arrays["canvas_len"].tolist(), arrays["rows_fed"].tolist()
    steps = [
        (length - count, canvas[:length])
        for length, count, canvas in zip(lengths, rows, arrays["canvas"].tolist(), strict=True)
    ]
    assert fed.steps == steps[: len(fed.steps)]


def test_memory_of_many_long_requests():
    """64 requests with `max_tokens` 4,096 on LLaDA-8B's shape take the memory of their first canvas blocks; the figures
    are in docs/families.md."""
    shape = SHAPES["llada-8b"]
    own = shape.model
    blocks = BlockShape(16, own.kv_heads, own.head_dim, RowShape(own.heads * own.head_dim, own.hidden))
    presets, prompt, new, gib = FAMILIES["LLaDAModelLM"].presets, 128, 4096, []
    for given in ({"preset": "dllm-var"}, {}):
        options = server_options(given, "low_confidence", presets)
        canvas = Canvas(options, shape.mask_id, 0, [1] * prompt, prompt + new)
        tokens = blocks.tokens(options, prompt, len(canvas), canvas.rows)
        if given:
            assert tokens == prompt + 64
        gib.append(64 * shape.kv_bytes(prompt + new if not given else tokens) / 2**30)
    said = (ROOT / "docs/families.md").read_text()
    assert f"{gib[0]:.0f} GiB instead of {gib[1]:.0f} GiB" in said


def test_memory_grows_by_blocks(engines):
    """A bound costs what has been reached of it."""
    llm, held = engines("llada-tiny", additional_config={"dlm": METHODS}), []

    class Held(Watching):
        def step_begins(self, states):
            (state,) = states
            held.append((state.canvas.rows, len(state.canvas.plan.live)))

    params = SamplingParams(
        temperature=0, max_tokens=64, ignore_eos=True, detokenize=False, extra_args={"dlm_block_length": 16}
    )
    with Held(llm):
        tokens(llm, [({"prompt_token_ids": list(range(30))}, params)])
    assert [rows for rows, _ in held[::16]] == [46, 62, 78, 94]
    assert [live for _, live in held[::16]] == [46, 32, 32, 32]
    assert {live for index, (_, live) in enumerate(held) if index % 16} == {16}
