"""Fast-dLLM v2: recorded runs of the official code, token for token and step for step."""

import json

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.running import Watching, tokens
from tests.engine.worker_calls import block_causal_logits_of

CHECKPOINT = "fast-dllm-v2-tiny"
RUNS = json.loads((GOLDEN / "rules2/runs.json").read_text())["runs"]
NAMES = [name for name, run in RUNS.items() if run["method"] == "fast_dllm_v2"]


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "rules2/runs" / f"{name}.safetensors")


class Fed(Watching):
    """First row, number of rows and canvas of each step that fills masks of the one request's current block. Rows of a
    prompt's whole blocks, which the first step computes along with them, do not count."""

    def __enter__(self):
        self.steps = []
        return super().__enter__()

    def step_begins(self, states):
        (state,) = states
        canvas, at = state.canvas, state.canvas.progress
        policy, live = canvas.options.reuse, canvas.plan.live
        if policy.reads(at) and not policy.predicted_before(at):
            first = max(int(live[0]), policy.final(at))
            self.steps.append([first, int(live[-1]) + 1 - first, canvas.tokens[: at.block[1]].tolist()])


def request(run: dict, arrays: dict, length: int):
    params = SamplingParams(
        temperature=0,
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "dlm_block_length": run["block_size"],
            "dlm_sub_block_length": run["small_block_size"],
            "dlm_threshold": run["threshold"],
        },
        stop_token_ids=[run["stop_token"]] if run["ended_by_stop"] else None,
    )
    return {"prompt_token_ids": arrays["prompt"].tolist()}, params


@pytest.mark.parametrize("name", NAMES)
def test_recorded_run(engines, name):
    run, arrays = RUNS[name], recorded(name)
    reuse = {"name": "sub_block", "length": run["small_block_size"]} if run["use_block_cache"] else {"name": "none"}
    llm, answer = engines(CHECKPOINT, additional_config={"dlm": {"reuse": reuse}}), arrays["final"].tolist()
    with Fed(llm) as fed:
        (got,) = tokens(llm, [request(run, arrays, len(answer))])
    assert list(got) == answer
    fills = arrays["kind"] > 0
    lengths = arrays["canvas_len"][fills].tolist()
    fed_rows = zip(*(arrays[name][fills].tolist() for name in ("first_row", "rows_fed", "canvas")), strict=True)
    steps = [[*rows, canvas[:length]] for (*rows, canvas), length in zip(fed_rows, lengths, strict=True)]
    assert fed.steps[: len(steps)] == steps


@pytest.mark.parametrize("case", range(5))
def test_logits(engines, case):
    arrays = load_file(GOLDEN / "rules2/runs/fast-dllm-v2-tiny.logits.safetensors")
    ids, width = arrays[f"c{case}.input_ids"].flatten(), int(arrays[f"c{case}.block_size"])
    (got,) = engines(CHECKPOINT).collective_rpc(block_causal_logits_of, args=(ids.tolist(), width))
    torch.testing.assert_close(got, arrays[f"c{case}.logits"].reshape(got.shape), atol=1e-4, rtol=1e-5)
