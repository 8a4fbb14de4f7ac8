"""Selections that requests name, at a server whose own selection reads a part of long prompts."""

import json

import pytest

from tests.integration.conftest import SELECTION
from tests.integration.serving import BLOCK, CHECKPOINT, chat, needle, options
from vllm_dlm.methods import methods
from vllm_dlm.plugins.selection.wavefilter import WaveFilter

SELECTIONS = [*sorted(methods("selection")), *(f"wavefilter/{preset}" for preset in WaveFilter.presets)]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_can_be_asked_for(viewed, selection):
    """It finds the needle, and reads as much of the cache as it says."""
    question, right = needle(repeats=15)

    def ask():
        return viewed.client.chat.completions.create(
            model=viewed.model,
            messages=chat(question),
            max_tokens=16,
            extra_body={"ignore_eos": True} | options(dlm_selection=selection, dlm_reuse="fast_dllm"),
        )

    answer, counts = viewed.counted(ask)
    assert answer.choices[0].message.content.startswith(right)
    prompt = answer.usage.prompt_tokens
    assert prompt > 600
    # of each layer and key head: what the block's rows read in the steps after its refresh
    config = json.loads((CHECKPOINT / "config.json").read_text())
    head_dim = config["d_model"] // config["n_heads"]
    steps, key = 16 - 16 // BLOCK, config["n_layers"] * config["n_kv_heads"] * 2 * head_dim * 2
    assert counts["kv_bytes_dense"] == steps * (prompt + 16) * key
    if selection == "unique":
        page = SELECTION["page_size"]
        behind = -(-(prompt + 16) // page) - prompt // page  # pages that are not wholly the prompt's
        assert counts["kv_bytes_read"] == steps * (SELECTION["budget_tokens"] + behind * page) * key
    elif methods("selection")[selection.partition("/")[0]].sparse:
        assert 0 < counts["kv_bytes_read"] < 0.6 * counts["kv_bytes_dense"]
    else:
        assert counts["kv_bytes_read"] == counts["kv_bytes_dense"]
