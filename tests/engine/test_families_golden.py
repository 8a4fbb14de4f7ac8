"""Families that came later: recorded runs of their official code, token for token and step for step."""

import json
from itertools import groupby

import pytest
import torch
from safetensors.torch import load_file
from vllm import SamplingParams

from tests.conftest import GOLDEN
from tests.engine.drawn import drawn
from tests.engine.running import all_blocks_are_free, answers, poison, tokens
from tests.engine.test_block_causal import Blocks
from tests.engine.test_rules_golden import Canvases
from tests.engine.tiny import SERVED, TINY, engine
from tests.engine.worker_calls import block_causal_logits_of, logits_of

RUNS = json.loads((GOLDEN / "families/runs.json").read_text())
#: by start of the runs' names: options with which the rule is that of the official code
DECODING = {
    "a2d": {"dlm_decoding": "low_confidence_linear"},
    "rnd1": {"dlm_decoding": "entropy_schedule"},
    "stable": {"dlm_decoding": "low_confidence"},
}


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "families/runs" / f"{name}.safetensors")


def named(attention: str, *families: str) -> list[str]:
    return [name for name, run in RUNS.items() if name.startswith(families) and run["attention"] == attention]


def asked(name: str, run: dict, prompt: list[int], length: int, **extra):
    params = SamplingParams(
        temperature=0,
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
        extra_args=DECODING[name.partition("-")[0].partition(".")[0]] | extra,
        stop_token_ids=[run["eos"]] if run["attention"] == "block_causal" else None,
    )
    return {"prompt_token_ids": prompt}, params


@pytest.mark.parametrize("name", named("full", "a2d"))
def test_a2d_over_the_whole_canvas(engines, name):
    run, arrays = RUNS[name], recorded(name)
    options = {"dlm_block_length": run["B"], "dlm_steps": run["steps"], "dlm_cfg_scale": run.get("cfg_scale", 0.0)}
    llm = engine(engines, run["ckpt"], "full")
    with Canvases(llm) as canvases:
        (got,) = tokens(llm, [asked(name, run, arrays["prompt"].tolist(), run["G"], **options)])
    assert list(got) == arrays["answer"].tolist()
    assert canvases.steps == arrays["canvas"].tolist()


@pytest.mark.parametrize("name", named("block_causal", "a2d", "stable"))
def test_block_by_block(engines, name):
    """Where the official code lays blocks out from the end of the prompt, or ends a canvas inside a block, the same
    rule with blocks at multiples of their width: see docs/families.md."""
    run, arrays = RUNS[name], recorded(name)
    whole = "_whole" if "answer_whole" in arrays else ""
    answer, width = arrays[f"answer{whole}"].tolist(), run["B"]
    blocks = -(-(run["P"] + run["G"]) // width) - run["P"] // width
    options = {"dlm_block_length": width, "dlm_steps": run["steps_of_block"] * blocks}
    if (threshold := run.get("threshold")) is not None:
        options |= {"dlm_decoding": "low_confidence_static", "dlm_threshold": threshold, "dlm_steps": "none"}
    llm = engine(engines, run["ckpt"], "block_causal")
    with Blocks(llm) as fed:
        (got,) = tokens(llm, [asked(name, run, arrays["prompt"].tolist(), run["G"], **options)])
    end = answer.index(run["eos"]) + 1 if run["eos"] in answer else run["G"]
    assert list(got) == answer[:end]
    steps = [[(p, t) for p, t in enumerate(step) if t >= 0][-width:] for step in arrays[f"canvas{whole}"].tolist()]
    assert fed.steps == [(step[0][0], [t for _, t in step]) for step in steps][: len(fed.steps)]


@pytest.mark.parametrize("name", named("full", "rnd1"))
def test_rnd1(engines, name):
    run, arrays = RUNS[name], recorded(name)
    options = {"dlm_steps": run["steps"], "dlm_order_temperature": run["temperature"]}
    if "eb_gamma" in run:
        options["dlm_eb_gamma"] = run["eb_gamma"]
    answer = arrays["answer"].tolist()[: run["masks"]]
    behind = arrays["canvas"][0].tolist()[run["P"] + run["masks"] :]
    if behind:
        options["dlm_suffix"] = behind
    llm = engine(engines, run["ckpt"], "full")
    with Canvases(llm) as canvases:
        (got,) = tokens(llm, [asked(name, run, arrays["prompt"].tolist(), run["masks"], **options)])
    assert list(got) == answer
    texts = [step[len(behind) :] + step[: len(behind)] for step in canvases.steps]  # rows of a suffix come first
    # the official code makes a forward where its schedule fills nothing, too
    assert texts == [canvas for canvas, _ in groupby(arrays["canvas"].tolist())]


@pytest.mark.parametrize("length", [1, 17, 64])
@pytest.mark.parametrize("family", ["a2d-qwen3", "a2d-qwen2", "a2d-llama", "rnd1"])
def test_logits(engines, family, length):
    arrays = recorded(f"{family}.logits{length}")
    llm = engine(engines, f"{family}-tiny", "full")
    ((got,),) = llm.collective_rpc(logits_of, args=([arrays["ids"].tolist()],))
    torch.testing.assert_close(got, arrays["logits"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 17, 64])
@pytest.mark.parametrize(
    "family, width, name",
    [
        ("a2d-qwen3", 8, "logits_block8"),
        ("a2d-qwen2", 8, "logits_block8"),
        ("a2d-llama", 8, "logits_block8"),
        ("stable-diffcoder", 4, "logits"),
        ("stable-diffcoder", 8, "logits_block8"),
    ],
)
def test_logits_of_blocks(engines, family, width, name, length):
    arrays = recorded(f"{family}.logits{length}")
    llm = engine(engines, f"{family}-tiny", "full")
    (got,) = llm.collective_rpc(block_causal_logits_of, args=(arrays["ids"].tolist(), width))
    torch.testing.assert_close(got, arrays[name], atol=1e-4, rtol=1e-5)


# -- every family that is registered -------------------------------------------------------------

#: their requests are drawn in test_matrix.py and test_block_causal.py
ELSEWHERE = {"LLaDAModelLM", "DreamModel", "SDARForCausalLM", "LLaDA2MoeModelLM", "SDARMoeForCausalLM"}
EACH = [case for case in SERVED if case[0] not in {TINY.get(architecture) for architecture in ELSEWHERE}]


@pytest.mark.parametrize("checkpoint, attention", EACH)
def test_drawn_requests_are_answered_as_alone(engines, checkpoint, attention):
    """Of every decoding, and of what else a request may ask for; in either order, and with poisoned memory"""
    llm = engine(engines, checkpoint, attention)
    given = drawn(llm, 10, f"{checkpoint} {attention}")
    together = answers(llm, given)
    assert answers(llm, given[::-1]) == together[::-1]
    poison(llm)
    assert [answers(llm, [one]) for one in given] == [[want] for want in together]
    assert all_blocks_are_free(llm)


@pytest.mark.parametrize(
    "checkpoint, attention",
    [case for case in EACH if (GOLDEN / "checkpoints" / case[0] / "tokenizer_config.json").exists()],
)
def test_a_question_in_words_is_answered(engines, checkpoint, attention):
    llm = engine(engines, checkpoint, attention)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    if llm.get_tokenizer().chat_template is None:  # of a base model
        (answer,) = llm.generate(["Why?"], params, use_tqdm=False)
    else:
        (answer,) = llm.chat([{"role": "user", "content": "Why?"}], params, use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == 9 and answer.outputs[0].finish_reason == "length"
    assert isinstance(answer.outputs[0].text, str) and len(answer.prompt_token_ids) > 1
