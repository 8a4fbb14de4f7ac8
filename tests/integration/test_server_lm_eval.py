"""lm_eval through a running server, against what the test computes from the same server by itself.

Skipped where lm_eval is not installed; `make` installs it (the extra `eval`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.serving import chat_text
from vllm_dlm.evaluation.__main__ import register
from vllm_dlm.evaluation.served import Served

Instance = pytest.importorskip("lm_eval.api.instance").Instance

TASKS = Path(__file__).with_name("lm_eval_tasks")
ROOT = TASKS.parents[2]
HOW = {"mc_num": 16, "seed": 4}

#: `python -m vllm_dlm.evaluation`, and lm_eval does not look through the ten thousand tasks that it brings along
COMMAND = """
import functools
from lm_eval.tasks import TaskManager
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
from vllm_dlm.evaluation.__main__ import main
main()
"""


def rows(name: str) -> list[dict]:
    return json.loads((TASKS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    for path in TASKS.glob("*.yaml"):
        (made / path.name).write_text(path.read_text().replace("FOLDER", str(TASKS)))
    return made


@pytest.fixture(scope="module")
def lm_eval(server, folder):
    """lm_eval(arguments, **model_args) -> the command, done: offline"""

    def run(*arguments: str, **model_args) -> subprocess.CompletedProcess:
        given = ",".join(f"{name}={value}" for name, value in ({"base_url": server.url} | model_args).items())
        command = [sys.executable, "-c", COMMAND, "run", "--model", "vllm_dlm", "--model_args", given]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "NO_PROXY": "*",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.run(
            [*command, *arguments, "--include_path", str(folder)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )

    return run


@pytest.fixture(scope="module")
def results(lm_eval, folder) -> dict:
    done = lm_eval(
        *("--tasks", "dlm_write,dlm_choose", "--apply_chat_template", "--log_samples", "--output_path", "out"),
        **HOW,
        dlm_steps=8,
        dlm_block_length=8,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = folder.glob("out/**/results_*.json")
    found = json.loads(path.read_text())["results"]
    for task in ("dlm_write", "dlm_choose"):
        (path,) = folder.glob(f"out/**/samples_{task}_*.jsonl")
        found[task]["samples"] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_texts(results, ask):
    right = []
    for row, sample in zip(rows("write"), results["dlm_write"]["samples"], strict=True):
        options = {"vllm_xargs": {"dlm_steps": 8, "dlm_block_length": 8}}
        answer = ask(row["question"], extra=options, temperature=0, stop=["."]).choices[0].message.content
        assert sample["resps"] == [[answer]]
        right.append(answer.strip() == row["answer"])
    assert results["dlm_write"]["exact_match,stripped"] == sum(right) / len(right) >= 0.5


def test_choices(results, server):
    """The context ends with its last character that is no space: what follows is part of what is scored. Behind a
    template lm_eval puts no space of its own."""
    served, right = Served(server.url), []
    for row, sample in zip(rows("choose"), results["dlm_choose"]["samples"], strict=True):
        context = chat_text(row["question"])
        spaces = context[len(context.rstrip()) :]
        scores = served.post(
            "/v1/dlm/score",
            context=context.rstrip(),
            add_special_tokens=False,
            **HOW,
            continuation=[f"{spaces}{choice}" for choice in row["choices"]],
        )["data"]
        logprobs = [score["logprob"] for score in scores]
        assert [float(value) for ((value, _),) in sample["resps"]] == pytest.approx(logprobs, abs=1e-4)
        assert [greedy == "True" for ((_, greedy),) in sample["resps"]] == [score["is_greedy"] for score in scores]
        right.append(logprobs.index(max(logprobs)) == row["answer"])
    assert results["dlm_choose"]["acc,none"] == sum(right) / len(right) >= 0.5


@pytest.fixture
def lm(server):
    """lm(**model_args) -> what lm_eval makes of them"""
    from lm_eval.api.registry import get_model

    register()

    def made(**model_args):
        given = ",".join(f"{name}={value}" for name, value in ({"base_url": server.url} | model_args).items())
        always = {"batch_size": 1, "max_batch_size": None, "device": None}
        return get_model("vllm_dlm").create_from_arg_string(given, always)

    return made


def asked(kind: str, *arguments):
    return [Instance(kind, {}, arguments, 0)]


def test_what_would_not_be_read_is_refused_by_name(lm):
    with pytest.raises(ValueError, match=r"^model_args: stpes not supported"):
        lm(stpes=4)
    with pytest.raises(ValueError, match="mc_num"):
        lm(mc_num=0).loglikelihood(asked("loglikelihood", "a", " b"))
    with pytest.raises(ValueError, match="dlm_stpes"):
        lm(dlm_stpes=4).generate_until(asked("generate_until", "a", {}))
    with pytest.raises(ValueError, match="dlm_stpes"):
        lm().generate_until(asked("generate_until", "a", {"dlm_stpes": 4}))
    with pytest.raises(NotImplementedError, match=r"^loglikelihood_rolling: "):
        lm().loglikelihood_rolling(asked("loglikelihood_rolling", "a b"))


def test_model_args(lm, server):
    """What goes where; before each prompt, until a chat template has made them."""
    served, made = Served(server.url), lm(bos="Sort:", method="blocks", steps=2, max_gen_toks=3, dlm_steps=2)
    ((logprob, greedy),) = made.loglikelihood(asked("loglikelihood", "", " a b c"))
    (wanted,) = served.post("/v1/dlm/score", context="Sort:", continuation=" a b c", method="blocks", steps=2)["data"]
    assert (logprob, greedy) == (wanted["logprob"], wanted["is_greedy"])
    (text,) = made.generate_until(asked("generate_until", " a b", {"until": []}))
    assert text == served.text("Sort: a b", {"dlm_steps": 2}, 3)
    template = made.apply_chat_template([{"role": "user", "content": "Copy: a b"}])
    assert template == chat_text("Copy: a b")
    assert made.generate_until(asked("generate_until", template, {"max_gen_toks": 16})) == [" a b"]
