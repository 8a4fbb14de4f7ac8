"""A family is its record: another one takes part without a line changed elsewhere."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.conftest import GOLDEN
from tests.docs.pages import PAGES, ROOT, words
from tests.engine.tiny import TINY
from vllm_dlm.configuration import is_diffusion_lm
from vllm_dlm.families import FAMILIES
from vllm_dlm.families.config import DiffusionConfig
from vllm_dlm.families.dream import FAMILY as DREAM
from vllm_dlm.families.family import Family, imported
from vllm_dlm.integration.registration import register_models
from vllm_dlm.kernels.rotary_write import rotate
from vllm_dlm.models.rope import RotaryTable
from vllm_dlm.models.transformer import DiffusionLayer
from vllm_dlm.options import OptionError, server_options

#: says `llada` in its config.json, and the rest of it in Llama's words
NORMED = Family(
    architecture="NormedModelLM",
    model_type="llada",
    model="vllm_dlm.families.dream.model:DreamModel",
    config=f"{__name__}:NormedConfig",
    decoding="random",
    end_of_turn="<|im_end|>",
    canvas=48,
    qk_norm=True,
)


class NormedConfig(DiffusionConfig):
    family = NORMED
    model_type = NORMED.model_type
    implemented = {"hidden_act": "silu"}


@pytest.fixture
def normed(monkeypatch, tmp_path):
    """A checkpoint's folder, of a family that is known for the length of a test. Its heads are wider than its width."""
    monkeypatch.setitem(FAMILIES, NORMED.architecture, NORMED)
    register_models()
    shutil.copytree(GOLDEN / "checkpoints/dream-tiny", tmp_path / "normed")
    path = tmp_path / "normed/config.json"
    fields = json.loads(path.read_text()) | {"architectures": [NORMED.architecture], "model_type": "llada"}
    del fields["auto_map"]
    path.write_text(json.dumps(fields | {"head_dim": 48, "num_attention_heads": 6, "num_key_value_heads": 3}))
    return path


def test_each_record_names_what_there_is():
    for architecture, family in FAMILIES.items():
        config = imported(family.config)
        assert architecture in family.architectures and config.family is family
        assert config.model_type == family.model_type
        assert imported(family.model).hf_to_vllm_mapper is not None


START_LINES = sorted(
    {line for page in PAGES for line in re.findall(r"`(vllm serve [^`]+)`", page.read_text()) if "…" not in line}
)


def test_start_lines_of_the_pages():
    """vLLM's parser takes them, and the model's options are valid for its family."""
    load_general_plugins()
    parser = make_arg_parser(FlexibleArgumentParser())
    assert len(START_LINES) >= len({family.model for family in FAMILIES.values()})
    for line in START_LINES:
        args = parser.parse_args(words(line)[2:])
        assert args.model_tag.count("/") == 1, line
        assert not args.hf_overrides or set(args.hf_overrides) == {"block_size"}, line
        if args.dlm_config:
            assert any(valid(args.dlm_config, family) for family in FAMILIES.values()), line


def valid(given: dict, family: Family) -> bool:
    try:
        return bool(server_options(given, family.decoding, family.presets, family.attention))
    except OptionError:
        return False


#: model of a start line in the README's table of families -> architecture
README_MODELS = {
    "GSAI-ML/LLaDA-8B-Instruct": "LLaDAModelLM",
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": "LLaDAMoEModelLM",
    "Dream-org/Dream-v0-Instruct-7B": "DreamModel",
    "inclusionAI/LLaDA2.0-mini": "LLaDA2MoeModelLM",
    "JetLM/SDAR-8B-Chat": "SDARForCausalLM",
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": "A2DQwen3LMHeadModel",
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": "A2DQwen3LMHeadModel",
    "radicalnumerics/RND1-Base-0910": "RND1",
    "ByteDance-Seed/Stable-DiffCoder-8B-Instruct": "StableDiffcoderForCausalLM",
    "Efficient-Large-Model/Fast_dLLM_v2_7B": "Fast_dLLM_QwenForCausalLM",
}
#: rows of the README name these along with another size or base of the same family
WITH_ANOTHER = {"SDARMoeForCausalLM", "A2DQwen2LMHeadModel", "A2DLlamaLMHeadModel"}


def readme_lines() -> list[str]:
    table = (ROOT / "README.md").read_text().partition("| serves |")[2].partition("\n\n")[0]
    return re.findall(r"`(vllm serve [^`]+)`", table)


def test_every_family_has_a_start_line_in_the_readme():
    assert {words(line)[2] for line in readme_lines()} == set(README_MODELS)
    named = {family.architecture for family in FAMILIES.values()}
    assert {FAMILIES[name].architecture for name in README_MODELS.values()} | WITH_ANOTHER == named


@pytest.mark.parametrize("line", readme_lines())
def test_a_start_line_starts_the_tiny_checkpoint(line):
    """Up to the engine's configuration; that each family answers is in tests/engine/test_families_golden.py"""
    load_general_plugins()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words(line)[2:])
    architecture = README_MODELS[args.model_tag]
    args.model = str(GOLDEN / "checkpoints" / TINY[architecture])
    args.max_model_len = 128
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert is_diffusion_lm(config.model_config)
    assert FAMILIES[config.model_config.architecture].architecture == architecture


def test_families_of_one_model_type_are_told_apart_by_their_architecture(normed):
    assert type(AutoConfig.from_pretrained(normed.parent)) is NormedConfig
    llada = AutoConfig.from_pretrained(GOLDEN / "checkpoints/llada-tiny")
    assert type(llada).__name__ == "LLaDAConfig" and llada.family is FAMILIES["LLaDAModelLM"]


def test_blocks_of_a_model_that_knows_them_need_a_width(normed, monkeypatch):
    """Of the server's options, where config.json has none"""
    monkeypatch.setitem(FAMILIES, NORMED.architecture, replace(NORMED, attention="block_causal", decoding="entropy"))
    with pytest.raises(ValueError, match="dlm_block_length: None is not valid"):
        AsyncEngineArgs(str(normed.parent), max_model_len=128).create_engine_config()
    dlm = {"decoding": {"name": "entropy", "block_length": 8}}
    AsyncEngineArgs(str(normed.parent), max_model_len=128, additional_config={"dlm": dlm}).create_engine_config()


def test_a_record_is_all_that_the_front_end_needs(normed):
    model = AsyncEngineArgs(str(normed.parent), max_model_len=128).create_engine_config().model_config
    assert is_diffusion_lm(model) and model.hf_config.logits_shift == 0
    assert model.hf_config.head_dim == model.get_head_size() == 48
    assert model.get_diff_sampling_param()["max_tokens"] == 48
    assert model.hf_config.eot_token_id == 392


@pytest.mark.parametrize("wrong", [0, 7, "48", True])
def test_a_width_of_heads_that_cannot_be(normed, wrong):
    normed.write_text(json.dumps(json.loads(normed.read_text()) | {"head_dim": wrong}))
    with pytest.raises(ValueError, match=f"NormedModelLM: head_dim={wrong!r} in config.json is not valid"):
        AsyncEngineArgs(str(normed.parent), max_model_len=128).create_engine_config()


def test_a_kind_of_attention_nobody_serves():
    with pytest.raises(ValueError, match="attention: 'causal' is not valid, it must be one of full, block_causal"):
        replace(NORMED, attention="causal")


# -- the layer -------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, WIDTH, EPS = 6, 3, 48, 128, 1e-6


def made_layer(worker, family: Family) -> tuple[DiffusionLayer, dict[str, torch.Tensor]]:
    """A layer with random weights as it serves, and those weights in float64."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    config = SimpleNamespace(
        family=family,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=64,
        rms_norm_eps=EPS,
    )
    with set_current_vllm_config(worker.vllm_config):
        layer = DiffusionLayer(config, worker.vllm_config, "layer").requires_grad_(False)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        weights = {name: parameter.double() for name, parameter in layer.self_attn.named_parameters()}
        # vLLM's CPU workers pack them
        process_weights_after_loading(layer, worker.model_config, torch.device("cpu"))
    return layer, weights


def queries_and_keys(worker, family: Family) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[(what the layer makes, the same stated directly in float64)] of queries and of keys"""
    torch.manual_seed(0)
    layer, weights = made_layer(worker, family)
    h_TE, positions = torch.randn(9, WIDTH), torch.arange(3, 12)
    rope = RotaryTable(HEAD_DIM, 10000.0, 64, torch.float32)(positions)
    q, k = (rotate(x, *rope) for x in layer.heads("qk", h_TE))
    return [
        (q, stated(weights, "q", HEADS, h_TE.double(), positions)),
        (k, stated(weights, "k", KV_HEADS, h_TE.double(), positions)),
    ]


def stated(weights: dict, which: str, heads: int, h_TE: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    x = h_TE @ weights[f"{which}_proj.weight"].T + weights.get(f"{which}_proj.bias", 0.0)  # [T, heads * D]
    x = x.reshape(len(h_TE), heads, HEAD_DIM)
    if (norm := weights.get(f"{which}_norm.weight")) is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    angle = positions[:, None, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)  # [T, 1, D/2]
    pair = torch.complex(x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pair.real, pair.imag], -1)


@pytest.mark.parametrize("family", [NORMED, DREAM], ids=["normed", "with biases"])
def test_queries_and_keys_of_a_layer(engines, family):
    (made,) = engines("llada-tiny").collective_rpc(queries_and_keys, args=(family,))
    (names,) = engines("llada-tiny").collective_rpc(parameter_names, args=(family,))
    assert {"q_norm.weight", "k_norm.weight"} <= names if family.qk_norm else {"q_proj.bias", "k_proj.bias"} <= names
    for own, direct in made:
        assert own.shape == direct.shape
        # float32 against float64: rounding of 128 products of size 1
        torch.testing.assert_close(own.double(), direct, rtol=1e-4, atol=1e-4)


def test_a_layer_without_the_options_has_nothing_of_them(engines):
    (names,) = engines("llada-tiny").collective_rpc(parameter_names, args=(FAMILIES["LLaDAModelLM"],))
    assert names == {f"{projection}_proj.weight" for projection in "qkvo"}


def parameter_names(worker, family: Family) -> set[str]:
    return set(made_layer(worker, family)[1])
