"""Checkpoints with quantized weights answer as float copies with the same values do, up to rounding; and whatever they
answer, it is the same in every batch, replayed or launched, on one rank or two."""

import json
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.model_executor.layers.linear import LinearBase

from tests.conftest import GOLDEN
from tests.engine.capture import Capturing, capturing
from tests.engine.matrix import assert_answers_are_those_alone, combinations, small
from tests.engine.running import Watching, runner_of, tokens
from tests.engine.test_captured import some
from tests.engine.test_ranks import mixed_requests, two_rank_environment
from tests.quantization.checkpoints import METHODS, pair, rounded_fp8, rounded_int8
from tests.tiers import slow
from vllm_dlm.families import FAMILIES
from vllm_dlm.methods import methods

__all__ = ["capturing"]  # a fixture


def checkpoints() -> dict[str, str]:
    """Checkpoint -> model class of its family"""
    found = {}
    for path in sorted((GOLDEN / "checkpoints").iterdir()):
        (architecture,) = json.loads((path / "config.json").read_text())["architectures"]
        found[path.name] = FAMILIES[architecture].model
    assert {family.model for family in FAMILIES.values()} == set(found.values())
    return found


SPARSE = sorted(name for name, selection in methods("selection").items() if selection.sparse)
#: Largest root mean square of the difference of logits, as a share of their own. The float copy rounds the inputs of
#: its linear layers as the method does. Experts also round between their two products, int4 ones to int8.
#: A value that lies between two roundings may fall either way, so the copies drift apart by single steps.
ERROR = {"int8": 0.05, "fp8": 0.25, "packed": 0.03, "gptq": 0.03, "awq": 0.03}
#: The median of the requests. A router may choose another expert for one of them, whose logits then move.
OF_EXPERTS = 0.06
#: Share of tokens. One that rounding changes changes those after it, and a router may choose another expert.
AGREEING, AGREEING_OF_EXPERTS = 0.35, 0.25
#: what a method does to a row of activations
ROUNDED = {"int8": rounded_int8, "fp8": rounded_fp8}


FIRST = ("dream-tiny", "llada-tiny", "llada2-tiny", "lladamoe-tiny", "rnd1-tiny", "sdar-tiny")  # of each model class
EXPERTS = ("llada2-tiny", "lladamoe-tiny", "rnd1-tiny")


def cases() -> list:
    """Each method with a model class in turn; the rest is slow."""
    models = checkpoints()
    assert {models[name] for name in FIRST} == set(models.values()) and len(FIRST) == len(set(models.values()))
    kept = [("llada-tiny", "fp8"), ("dream-tiny", "packed"), ("sdar-tiny", "awq"), ("llada2-tiny", "int8")]
    kept.append(("lladamoe-tiny", "gptq"))
    assert {method for _, method in kept} == set(METHODS)
    rest = [(name, method) for name in models for method in METHODS if (name, method) not in kept]
    no_kernel = {(name, method) for name in EXPERTS for method in ("fp8", "packed")}  # of experts on a CPU
    return [*kept, *slow(*(case for case in rest if case not in no_kernel))]


@pytest.fixture(scope="module")
def copies(folder):
    """copies(checkpoint, method) -> quantized copy, copy of its values, dtype"""

    def made(checkpoint: str, method: str):
        return *(str(path) for path in pair(checkpoint, method, folder)), METHODS[method][2]

    return made


def greedy(count: int):
    for index in range(count):
        prompt = np.random.default_rng(index).integers(0, 390, 8 + 5 * index).tolist()
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
        yield {"prompt_token_ids": prompt}, params


class FirstLogits(Watching):
    """The logits of each request's first step, as floats"""

    def __enter__(self):
        self.found = {}
        return super().__enter__()

    def head_read(self, hidden, requests):
        for request in requests:
            logits = self.denoiser.model.compute_logits(hidden[request.rows]).float()
            self.found.setdefault(request.state.req_id, logits.cpu().numpy())


@contextmanager
def rounding(llm, method: str):
    """The inputs of linear layers are rounded, but for routers and head, while a test runs."""
    round_rows, hooks = ROUNDED.get(method, lambda x: x), []
    for _, module in linear_layers(runner_of(llm).model):
        hooks.append(module.register_forward_pre_hook(lambda _, given: (round_rows(given[0]), *given[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def recorded(llm, given) -> tuple[list, dict[str, np.ndarray]]:
    with FirstLogits(llm) as first:
        found = tokens(llm, given)
    assert len(first.found) == len(given)
    return found, {str(index): first.found[name] for index, name in enumerate(sorted(first.found, key=number))}


def number(request_id: str) -> int:
    return int(request_id.partition("-")[0])


@pytest.mark.parametrize("checkpoint, method", cases())
def test_answers_are_those_of_the_values(engines, copies, checkpoint, method):
    quantized, plain, dtype = copies(checkpoint, method)
    given = list(greedy(6))
    mine, logits = recorded(engines(quantized, dtype=dtype), given)
    with rounding(other := engines(plain, dtype=dtype), method):
        wanted, exact = recorded(other, given)
    error = [
        np.sqrt(np.square(logits[name] - exact[name]).mean()) / np.sqrt(np.square(exact[name]).mean()) for name in exact
    ]
    agreeing = np.mean([np.mean(np.array(own) == np.array(other)) for own, other in zip(mine, wanted, strict=True)])
    print(f"{checkpoint} {method}: {agreeing:.1%} of the tokens, error of logits {np.mean(error):.4f}")
    of_experts = checkpoint in EXPERTS
    assert agreeing >= (AGREEING_OF_EXPERTS if of_experts else AGREEING)
    assert np.median(error) < OF_EXPERTS if of_experts else max(error) < ERROR[method]
    if method == "int8" and not of_experts:
        assert min(error) < 1e-5, "sums of whole numbers are exact"
    assert [tokens(engines(quantized, dtype=dtype), [request])[0] for request in given] == mine


@pytest.mark.parametrize("checkpoint, method", cases())
def test_every_layer_multiplies_with_the_values(engines, copies, checkpoint, method):
    """Each linear layer on its own: the shards, their scales and the order of channels"""
    quantized, plain, dtype = copies(checkpoint, method)
    mine, other = (dict(linear_layers(runner_of(engines(path, dtype=dtype)).model)) for path in (quantized, plain))
    draw, tolerance = torch.Generator().manual_seed(5), 1e-4 if dtype == "float32" else 2e-2
    assert set(mine) == set(other) and len(mine) > 12
    for name, layer in mine.items():
        rows = torch.randn(5, layer.input_size, generator=draw).to(getattr(torch, dtype))
        with torch.inference_mode():
            got, wanted = layer(rows)[0], other[name](ROUNDED.get(method, lambda x: x)(rows))[0]
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item(), msg=name)
    if checkpoint in EXPERTS:
        found = []
        for path in (quantized, plain):
            runner = runner_of(engines(path, dtype=dtype))
            rows = torch.randn(9, 128, generator=torch.Generator().manual_seed(6)).to(getattr(torch, dtype))
            with torch.inference_mode(), runner.forwards():
                found.append(runner.model.model.layers[1].feed_forward(rows).float())
        error = (found[0] - found[1]).square().mean().sqrt() / found[1].square().mean().sqrt()
        assert error < 0.03, error


def linear_layers(model):
    """Those that are quantized"""
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and not name.endswith(".gate"):
            yield name, module


def test_a_quantized_model_is_not_the_float_one(engines, copies):
    """The comparison above has something to find."""
    quantized, _, dtype = copies("llada-tiny", "int8")
    given = list(greedy(2))
    (_, logits), (_, exact) = (recorded(engines(path, dtype=dtype), given) for path in (quantized, "llada-tiny"))
    assert not np.array_equal(logits["0"], exact["0"])


@pytest.mark.parametrize(
    "checkpoint, method, selections",
    [
        ("llada-tiny", "int8", SPARSE[:1]),
        *slow(("dream-tiny", "int8", SPARSE), ("dream-tiny", "packed", SPARSE), ("llada-tiny", "fp8", SPARSE)),
    ],
)
def test_every_policy_and_selection_answers_as_alone(engines, copies, checkpoint, method, selections):
    quantized, _, dtype = copies(checkpoint, method)
    for selection in selections:
        options = {"dlm": {"selection": small("selection", selection)}}
        llm = engines(quantized, dtype=dtype, additional_config=options)
        assert_answers_are_those_alone(llm, list(combinations(selection)))


@pytest.mark.parametrize("method", ["int8", *slow("gptq")])
@pytest.mark.parametrize("reuse", sorted(name for name, reuse in methods("reuse").items() if reuse.caches))
def test_replayed_steps_are_the_steps(engines, copies, capturing, method, reuse):
    quantized, _, dtype = copies("llada-tiny", method)
    llm, given = engines(quantized, dtype=dtype), list(some(reuse, 6, guided=True))
    wanted = tokens(llm, given)
    captured: Capturing = capturing(llm)
    for cache in runner_of(llm).kv_caches:
        cache.fill_(torch.nan)
    assert tokens(llm, given) == wanted
    assert any(bucket in captured.steps for bucket in captured.met)


def test_fp8_projections_are_joined(engines, copies):
    """As on a GPU, where layers have weights and scales in the same layout"""
    quantized, _, dtype = copies("dream-tiny", "fp8")
    llm, given = engines(quantized, dtype=dtype), list(mixed_requests(8))
    model, separate = runner_of(llm).model, tokens(llm, given)
    model.join_projections()
    assert all(layer.joined is not None for layer in model.model.layers)
    assert tokens(llm, given) == separate


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["dream-tiny", "llada2-tiny"])
def test_two_ranks_answer_as_one(engines, copies, checkpoint):
    quantized, _, dtype = copies(checkpoint, "int8")
    given = list(greedy(6))
    one = tokens(engines(quantized, dtype=dtype), given)
    code = f"from tests.quantization.test_tokens import two_ranks\nif __name__ == '__main__': two_ranks({quantized!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=GOLDEN.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
        env=two_rank_environment() | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"},  # ranks inherit operators of tests
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (*_, line) = (line for line in done.stdout.splitlines() if line.startswith("TOKENS "))
    two = json.loads(line.removeprefix("TOKENS "))
    agreeing = np.mean([np.mean(np.array(own) == np.array(other)) for own, other in zip(two, one, strict=True)])
    assert agreeing >= AGREEING  # rounding of partial sums differs, and activations are quantized by rank


def two_ranks(checkpoint: str) -> None:
    from tests.conftest import start_engine
    from tests.quantization import operators

    operators.provide()
    llm = start_engine(checkpoint, tensor_parallel_size=2)
    print("TOKENS", json.dumps(tokens(llm, list(greedy(6)))), flush=True)
