"""The statement of a model that the suite `real` measures with, on a tiny random model."""

import pytest
import torch

from benchmarks.lib import page_rules, runner
from benchmarks.lib.llama import Llama, causal
from benchmarks.lib.real_model import prose
from benchmarks.lib.workloads import paired
from tests.benchmarks.test_plan import options
from vllm_dlm.plugins.selection.second_look import SecondLook
from vllm_dlm.plugins.selection.unique import Unique
from vllm_dlm.plugins.selection.wavefilter import WaveFilter

PAGES = {"page_size": 16, "budget_tokens": 96, "min_context": 0, "dense_layers": (1,)}
RULES = [
    Unique(**PAGES),
    SecondLook(**PAGES),
    page_rules.Quest(**PAGES),
    page_rules.Exact(**PAGES),
    page_rules.Recency(**PAGES),
]


def whole(model: Llama, ids: list[int], mask) -> torch.Tensor:
    """Losses of all tokens from one dense forward. `mask(layer, q, keys)`: [Hkv, T, T]"""
    return model.losses(ids[:-1], ids[1:], model.prompt([]), mask)


@pytest.fixture(scope="module")
def text() -> tuple[Llama, list[int], int]:
    torch.set_grad_enabled(False)
    ids = torch.randint(0, 256, (201,), generator=torch.Generator().manual_seed(1)).tolist()
    yield Llama.random(), ids, 40
    torch.set_grad_enabled(True)


def test_a_continuation_is_that_of_the_whole_text(text):
    model, ids, tail = text
    start = len(ids) - tail
    found = model.losses(ids[start - 1 : -1], ids[start:], model.prompt(ids[: start - 1]))
    torch.testing.assert_close(found, whole(model, ids, None)[-tail:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_sparse_positions_are_those_of_a_dense_mask(text, rule):
    """The choice of every position is written into one mask of the whole text, with which the model runs once."""
    model, ids, tail = text
    start = len(ids) - tail
    prompt, masks = model.prompt(ids[: start - 1]), {}
    visible = page_rules.decoding(rule, prompt.length)

    def recorded(layer, q, keys):
        masks[layer] = visible(layer, q, keys)
        return masks[layer]

    def full(layer, q, keys):
        mask = causal(len(q), keys.shape[1]).repeat(model.kv_heads, 1, 1)
        if masks[layer] is not None:
            mask[:, -tail:] = masks[layer]
        return mask

    found = model.losses(ids[start - 1 : -1], ids[start:], prompt, recorded)
    torch.testing.assert_close(found, whole(model, ids, full)[-tail:], atol=1e-5, rtol=0)
    read = masks[0].sum(2)
    assert masks[1] is None and not torch.equal(found, model.losses(ids[start - 1 : -1], ids[start:], prompt))
    # full pages of the budget, of which the last one may be unfinished
    position = torch.arange(len(ids) - 1 - tail, len(ids) - 1)
    assert torch.equal(read, (rule.budget_tokens - 15 + position % 16).expand(model.kv_heads, -1))


@pytest.mark.parametrize("rule", [*RULES, WaveFilter(proportions=(0.4, 0.4))], ids=lambda rule: rule.name)
def test_positions_that_choose_together_read_the_same_of_a_prompt(text, rule):
    _, ids, tail = text
    length = len(ids) - tail
    keys = torch.randn(2, len(ids), 32, generator=torch.Generator().manual_seed(2))
    q = torch.randn(tail, 4, 32, generator=torch.Generator().manual_seed(3))
    mask = page_rules.together(rule, length)(0, q, keys)
    assert (mask[:, :, :length] == mask[:, :1, :length]).all()
    assert torch.equal(mask[0, :, length:], causal(tail, len(ids))[:, length:])
    units = rule.prompt_units(length)
    read = mask[:, 0, : units.candidates].sum(1)
    assert (read == units.kept * rule.unit).all() and units.kept * rule.unit < units.candidates


def test_exact_pages_are_those_with_the_most_attention():
    rule = page_rules.Exact(**PAGES | {"budget_tokens": 64})
    keys = torch.zeros(1, 160, 32)
    keys[0, 70], keys[0, 100] = 3.0, 2.0  # in pages 4 and 6
    mask = page_rules.decoding(rule, 159)(0, torch.ones(1, 2, 32), keys)
    assert mask[0, 0].nonzero().flatten().unflatten(0, (-1, 16))[:, 0].tolist() == [0, 64, 128, 144]


def test_interval_over_texts():
    mean, low, high = paired([1.0, 2.0, 3.0], [0.5, 1.0, 1.5])
    assert (mean, low, high) == pytest.approx((1.0, -0.2421, 2.2421), abs=1e-4)


def test_manual_pages_become_prose():
    pod = "package X;\n\n=head1 NAME\n\nB<C<x>> is F<y>.\n\n=over 4\n\n=item L<z>\n\n=back\n\n=cut\n\n1;\n"
    assert prose(pod).split() == ["NAME", "x", "is", "y.", "z"]


def test_a_toy_run_measures_every_rule(tmp_path):
    words = ("real", "--toy", "--results", str(tmp_path), "--in-process", "--busy")
    made = runner.run(options(*words))
    assert made.complete
    for table in ("real-decoding", "real-blocks"):
        rows = made.report(table).rows
        assert not any("failed" in row for row in rows) and (tmp_path / f"{table}.png").exists()
        assert {row["rule"] for row in rows} >= {"dense", "unique", "quest", "recent only", "exact best pages"}
        assert all(row["low"] <= row["added"] <= row["high"] for row in rows if row["rule"] != "dense")
