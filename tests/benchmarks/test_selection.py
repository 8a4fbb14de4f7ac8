"""The rules that selections are compared with, and the measure of attention kept."""

import numpy as np
import pytest
import torch

from benchmarks.baselines import Oracle, Quest, SparseDLLM, attention_mass
from benchmarks.selection import SelectionEngine, page_rules, questions, token_rules
from vllm_dlm.kernels.page_scores import naive
from vllm_dlm.plugins.selection.base import Asked


@pytest.fixture
def asked():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 300, 16, generator=generator)
    q = torch.randn(4, 4, 16, generator=generator)

    def read(runs, size):
        both = torch.cat([keys, keys], -1)[:, : 300 // size * size].unflatten(1, (-1, size))
        return torch.stack([own[where] for own, where in zip(both, runs.long(), strict=True)])

    voters = torch.tensor([True, False, True, True])
    return Asked(q, voters, torch.zeros(2, 0, 32), read, 256, 300, 0.25, None), keys


def test_quest_scores_the_most_a_key_in_the_box_could(asked):
    given, keys = asked
    quest = Quest(page_size=16, budget_tokens=96, min_context=0, dense_layers=(), sink_pages=0, recent_pages=1)
    given.summary = quest.summarise(keys[:, :256].transpose(0, 1)).transpose(0, 1)
    pages = keys[:, :256].unflatten(1, (16, 16))
    top, bottom = pages.amax(2), pages.amin(2)  # [Hkv, 16, D]
    rows = given.q.unflatten(1, (2, 2)).permute(1, 0, 2, 3).flatten(1, 2)[:, :, None]  # [Hkv, n * G, 1, D]
    bound = torch.maximum(rows * top[:, None], rows * bottom[:, None]).sum(-1).amax(1)  # [Hkv, 16]
    bound[:, -1] = naive.FORCED
    assert torch.equal(quest.choose(given).units.long(), bound.topk(6)[1].sort()[0])


def test_oracle_keeps_the_tokens_of_most_attention(asked):
    given, keys = asked
    rows = given.q[given.voters]
    for head in range(2):
        weight = (
            torch.einsum("lgd,nd->lgn", rows[:, 2 * head : 2 * head + 2], keys[head]).mul(0.25).softmax(-1).sum((0, 1))
        )
        torch.testing.assert_close(attention_mass(given)[head], weight)
        want = weight[:256].topk(26)[1].sort()[0]
        assert torch.equal(Oracle(0.1).choose(given).units[head].long(), want)


def test_every_rule_keeps_what_its_budget_says(asked):
    given, keys = asked
    for share in (0.25, 0.16, 0.09, 0.0625):
        for name, rule in token_rules(share).items():
            given.summary = rule.summarise(keys[:, :256].transpose(0, 1)).transpose(0, 1)
            units = rule.choose(given).units
            assert units.shape[1] * rule.unit == pytest.approx(share * 256, abs=6), name
    for name, rule in page_rules(256, 0.5).items():
        given.summary = rule.summarise(keys[:, :256].transpose(0, 1)).transpose(0, 1)
        assert rule.choose(given).units.shape == (2, 8), name
    shared = SparseDLLM(0.1).choose(given).units
    assert torch.equal(shared[0], shared[1])


@pytest.fixture(scope="session")
def engine():
    """Kept for the session: dropped, it would end torch.distributed for the engines of the other tests."""
    return SelectionEngine(320)


def test_grades_on_the_demo_checkpoint(engine):
    samples = questions(6, 256)

    class Silent:
        def update(self, _): ...

    torch.manual_seed(0)  # the random rule draws from torch's generator
    dense = engine.grade(None, samples, Silent())
    grades = {name: engine.grade(rule, samples, Silent()) for name, rule in token_rules(0.25).items()}
    assert dense["exact_match"] >= 5 / 6 and "mass" not in dense
    for name, grade in grades.items():
        assert grade["of_oracle"] <= 1 + 1e-6 and grade["kept"] == pytest.approx(0.25, abs=0.02), name
    assert grades["oracle"]["of_oracle"] == pytest.approx(1, abs=1e-6)
    assert grades["wavefilter/paper"]["mass"] > 2 * grades["random"]["mass"]
    assert np.isclose(grades["random"]["mass"], 0.25, atol=0.1)
