"""Checkpoints of the same classes in other forms: tied head, other dtypes, random weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from tests.conftest import GOLDEN, golden_tensors
from tests.engine.worker_calls import logits_of


def edited(tmp_path, source: str, config: dict, change):
    """A copy of a golden checkpoint with other config values and tensors."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "checkpoints" / source, folder)
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(written))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tied_head_as_in_illada(engines, tmp_path):
    """Grouped-query LLaDA whose head is its embedding and has no tensor of its own."""

    def tie(tensors):
        del tensors["model.transformer.ff_out.weight"]
        return tensors

    folder = edited(tmp_path, "llada-tiny-gqa", {"weight_tying": True}, tie)
    canvas = golden_tensors("llada-tiny-gqa.logits")["c1.input_ids"][0].tolist()
    hidden = golden_tensors("llada-tiny-gqa.logits")["c1.hidden_states"][-1]
    embedding = load_file(folder / "model.safetensors")["model.transformer.wte.weight"].float()
    ((logits,),) = engines(str(folder)).collective_rpc(logits_of, args=([canvas],))
    torch.testing.assert_close(logits, hidden @ embedding.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpoint", ["llada-tiny", "dream-tiny"])
def test_bfloat16(engines, checkpoint):
    """As far from the reference's bfloat16 logits as those are from float32, and no further."""
    want = golden_tensors(f"{checkpoint}.logits")
    canvas = want["c2.input_ids"][0].tolist()
    ((logits,),) = engines(checkpoint, dtype="bfloat16").collective_rpc(logits_of, args=([canvas],))
    exact, reference = want["c2.logits"][0], want["c2.logits_bf16"][0].float()
    assert (logits.float() - exact).abs().mean() < 1.5 * (reference - exact).abs().mean()


def test_dummy_weights(engines):
    llm = engines("llada-tiny", load_format="dummy")
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    output = llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 16 and 392 not in output.outputs[0].token_ids
