"""The reuse policies in parity mode against outputs of the official dLLM-Cache and DyLLM code, and of Fast-dLLM."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN, golden_tensors
from tests.engine.running import Recorder

RUNS = json.loads((GOLDEN / "reuse" / "runs.json").read_text())["runs"]


def policy(run: dict) -> dict:
    if run["method"] == "dllm_cache":
        fields = {"prompt_interval": run["Kp"], "response_interval": run["Kr"], "transfer_ratio": run["rho"]}
        return {"name": "dllm_cache", "parity": True, **fields}
    return {"name": "dyllm", "parity": True, "threshold": run["tau"], "full_steps": run["num_full_steps"]}


def prompts_of(tensors: dict) -> list[str]:
    return ["req0.", "req1."] if "req0.prompt_ids" in tensors else [""]


OFFICIAL = [pytest.param(run, id=run["file"].removesuffix(".safetensors")) for run in RUNS]


def official(engines, run: dict):
    """An engine that is set as the official code was."""
    return engines(run["checkpoint"], additional_config={"dlm": {"reuse": policy(run)}})


@pytest.mark.parametrize("run", OFFICIAL)
def test_official_outputs(engines, run):
    assert_official_outputs(official(engines, run), run)


def assert_official_outputs(llm, run: dict) -> None:
    """Every token, and the logits of every step."""
    tensors = load_file(GOLDEN / "reuse" / run["file"])
    params = SamplingParams(
        temperature=0,
        max_tokens=run["gen_len"],
        ignore_eos=True,
        detokenize=False,
        extra_args={"dlm_block_length": run["block"], "dlm_steps": run["steps"]},
    )
    prefixes = prompts_of(tensors)
    prompts = [{"prompt_token_ids": tensors[f"{prefix}prompt_ids"].tolist()} for prefix in prefixes]
    with Recorder(llm) as recorder:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    recorded = [recorder.steps[key] for key in sorted(recorder.steps, key=lambda k: int(k.split("-")[0]))]
    for prefix, prompt, output, steps in zip(prefixes, prompts, outputs, recorded, strict=True):
        assert list(output.outputs[0].token_ids) == tensors[f"{prefix}final_ids"].tolist()
        columns, want = tensors[f"{prefix}vocab_cols"].numpy(), tensors[f"{prefix}logits_cols"].numpy()
        assert len(steps) == len(want)
        stop = None if run["exact_parity_recommended"] else run["noise_first_selection_change_step"]
        for step, (positions, logits) in enumerate(steps[:stop]):
            rows = positions - len(prompt["prompt_token_ids"])
            np.testing.assert_allclose(logits[:, columns], want[step][rows], atol=1e-3, err_msg=f"step {step}")


FAST = {
    "llada.fastdllm_prefix_s32": {"cache": "prefix"},
    "llada.fastdllm_prefix_thr0.9": {"cache": "prefix"},
    "llada.fastdllm_dual_s32": {"cache": "dual"},
    "llada.fastdllm_dual_thr0.9": {"cache": "dual"},
    "dream.fastdllm_block_dual_thr0.9": {"cache": "dual"},
}


def fast(engines, golden_runs, name: str):
    reuse = {"name": "fast_dllm", **FAST[name]}
    return engines(golden_runs[name]["model"], additional_config={"dlm": {"reuse": reuse}})


@pytest.mark.parametrize("name", FAST)
def test_fast_dllm_runs(engines, golden_runs, name):
    assert_fast_run(fast(engines, golden_runs, name), golden_runs, name)


def assert_fast_run(llm, golden_runs, name: str) -> None:
    params, tensors = golden_runs[name]["params"], golden_tensors(name)
    options = {"dlm_block_length": params["block_length"]}
    if "threshold" in params:
        options["dlm_threshold"] = params["threshold"]
    else:
        options["dlm_steps"] = params["steps"]
    if name.startswith("dream"):
        options["dlm_decoding"] = "maskgit_plus"
    prompt, final = tensors["prompt"][0], tensors["final"][0]
    sampling = SamplingParams(
        temperature=0, max_tokens=len(final) - len(prompt), ignore_eos=True, detokenize=False, extra_args=options
    )
    output = llm.generate({"prompt_token_ids": prompt.tolist()}, sampling, use_tqdm=False)[0]
    assert list(output.outputs[0].token_ids) == final[len(prompt) :].tolist()
