"""The rules that selections are compared with, and the measure of attention kept."""

import numpy as np
import pytest
import torch

from benchmarks.lib.workloads import recall_questions
from benchmarks.suites.quality import start
from benchmarks.suites.selection import grade, page_rules, token_rules
from benchmarks.suites.selection_rules import Oracle, Quest, SparseDLLM, attention_mass
from tests.plugins.asking import canvas_asks
from vllm_dlm.kernels.page_scores import naive


@pytest.fixture
def given():
    """Queries, which of them vote, and the keys of a canvas of 300 whose prompt is 256 long."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(300, 2, 16, generator=generator)
    q = torch.randn(4, 4, 16, generator=generator)
    return q, torch.tensor([True, False, True, True]), keys


def asks(rule, q, voters, keys):
    return canvas_asks(rule, q, keys, prompt_len=256, length=300, voters=voters, scale=0.25)


def test_quest_scores_the_most_a_key_in_the_box_could(given):
    q, voters, keys = given
    quest = Quest(page_size=16, budget_tokens=96, min_context=0, dense_layers=(), sink_pages=0, recent_pages=1)
    pages = keys[:256].transpose(0, 1).unflatten(1, (16, 16))
    top, bottom = pages.amax(2), pages.amin(2)  # [Hkv, 16, D]
    rows = q[voters].unflatten(1, (2, 2)).permute(1, 0, 2, 3).flatten(1, 2)[:, :, None]  # [Hkv, n * G, 1, D]
    bound = torch.maximum(rows * top[:, None], rows * bottom[:, None]).sum(-1).amax(1)  # [Hkv, 16]
    bound[:, -1] = naive.FORCED
    assert torch.equal(quest.choose(asks(quest, *given)).units[0].long(), bound.topk(6)[1].sort()[0])


def test_oracle_keeps_the_tokens_of_most_attention(given):
    q, voters, keys = given
    asked = asks(Oracle(0.1), *given)
    for head in range(2):
        rows = q[voters, 2 * head : 2 * head + 2]
        weight = torch.einsum("lgd,nd->lgn", rows, keys[:, head]).mul(0.25).softmax(-1).sum((0, 1))
        torch.testing.assert_close(attention_mass(asked)[head], weight)
        want = weight[:256].topk(26)[1].sort()[0]
        assert torch.equal(Oracle(0.1).choose(asked).units[0, head].long(), want)


def test_every_rule_keeps_what_its_budget_says(given):
    for share in (0.25, 0.16, 0.09, 0.0625):
        for name, rule in token_rules(share).items():
            units = rule.choose(asks(rule, *given)).units
            assert units.shape[2] * rule.unit == pytest.approx(share * 256, abs=6), name
    for name, rule in page_rules(256, 0.5).items():
        assert rule.choose(asks(rule, *given)).units.shape == (1, 2, 8), name
    shared = SparseDLLM(0.1).choose(asks(SparseDLLM(0.1), *given)).units
    assert torch.equal(shared[0, 0], shared[0, 1])


@pytest.fixture(scope="session")
def engine():
    """Kept for the session: dropped, it would end torch.distributed for the engines of the other tests."""
    return start(320)


@pytest.mark.slow
def test_grades_on_the_demo_checkpoint(engine):
    samples = recall_questions(6, 256, 47, 11)
    dense = grade(engine, None, samples)
    grades = {name: grade(engine, rule, samples) for name, rule in token_rules(0.25).items()}
    assert dense["exact_match"] >= 5 / 6 and "mass" not in dense
    for name, found in grades.items():
        assert found["of_oracle"] <= 1 + 1e-6 and found["kept"] == pytest.approx(0.25, abs=0.02), name
    assert grades["oracle"]["of_oracle"] == pytest.approx(1, abs=1e-6)
    assert grades["wavefilter/paper"]["mass"] > 2 * grades["random"]["mass"]
    assert np.isclose(grades["random"]["mass"], 0.25, atol=0.1)
