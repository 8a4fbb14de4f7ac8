"""A diffusion model whose config.json has Llama's model_type, and the Llamas beside it, which stay vLLM's."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlavaConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.transformers_utils.configs.eagle import EAGLEConfig
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

from tests.conftest import GOLDEN, start_engine
from tests.engine.running import tokens
from tests.integration.bad_checkpoints import DIFFCODER, copied
from tests.page_sparse.models import write
from vllm_dlm.configuration import is_diffusion_lm
from vllm_dlm.families import FAMILIES, record_of
from vllm_dlm.families.stable_diffcoder.config import StableDiffcoderConfig
from vllm_dlm.integration.bodies import set_template_defaults

SHARED = {family.written_model_type for family in FAMILIES.values()} - {None}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("llama"))


def configured(path, **settings):
    settings = {"max_model_len": 128, "skip_tokenizer_init": True} | settings
    return AsyncEngineArgs(str(path), **settings).create_engine_config()


def test_nothing_is_registered_for_the_model_type_of_others(llama):
    configured(GOLDEN / "checkpoints" / DIFFCODER)
    assert {"llama"} == SHARED
    for model_type in SHARED:
        assert model_type not in _CONFIG_REGISTRY and model_type not in MODEL_ARCH_CONFIG_CONVERTORS
        assert type(AutoConfig.for_model(model_type)) is CONFIG_MAPPING[model_type] is LlamaConfig
    assert type(AutoConfig.from_pretrained(llama)) is LlamaConfig


def test_llamas_are_read_as_without_the_plugin(llama):
    """On their own, as a text part, as a draft model"""
    config = configured(llama)
    assert type(config.model_config.hf_config) is LlamaConfig and not is_diffusion_lm(config.model_config)
    assert "vllm_dlm" not in config.parallel_config.worker_cls and config.scheduler_config.scheduler_cls is None
    assert type(LlavaConfig(text_config={"model_type": "llama"}).text_config) is LlamaConfig
    draft = EAGLEConfig({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert draft.architectures == ["EagleLlamaForCausalLM"] and type(draft.model) is LlamaConfig


def test_the_architecture_tells(tmp_path):
    hf = configured(GOLDEN / "checkpoints" / DIFFCODER).model_config.hf_config
    assert type(hf) is StableDiffcoderConfig
    assert (hf.mask_token_id, hf.block_size, hf.head_dim, hf.logits_shift) == (5, 4, 32, 0)
    renamed = copied(DIFFCODER, tmp_path, {"architectures": ["LlamaForCausalLM"]})
    assert not is_diffusion_lm(configured(renamed).model_config)
    model = configured(renamed, hf_overrides={"architectures": ["StableDiffcoderForCausalLM"]}).model_config
    assert is_diffusion_lm(model) and type(model.hf_config) is StableDiffcoderConfig


LLAMAS: list = []  # kept: an engine that is collected ends the groups of its process, which others use


def test_both_start_and_answer(engines, llama):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (first,) = tokens(engines(DIFFCODER), [({"prompt_token_ids": [7, 8, 9]}, params)])
    prompt = list(range(5, 25))
    LLAMAS.append(start_engine(str(llama), max_model_len=128))
    (got,) = tokens(LLAMAS[-1], [({"prompt_token_ids": prompt}, params)])
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    wanted = reference.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    assert list(got) == wanted.tolist()
    (again,) = tokens(engines(DIFFCODER), [({"prompt_token_ids": [7, 8, 9]}, params)])
    assert again == first and len(first) == 8


# -- which attention, where config.json does not say ---------------------------------------------


@pytest.mark.parametrize("architecture", [name for name, family in FAMILIES.items() if family.with_block_size])
def test_a_block_size_says_that_attention_is_block_by_block(architecture):
    checkpoint = next(
        path.parent
        for path in (GOLDEN / "checkpoints").glob("*/config.json")
        if json.loads(path.read_text())["architectures"] == [architecture]
    )
    whole = configured(checkpoint).model_config
    blocks = configured(checkpoint, hf_overrides={"block_size": 8}).model_config
    assert record_of(whole).attention == "full" and not whole.dlm_options.grows
    assert record_of(blocks).attention == "block_causal" and blocks.dlm_options.grows
    assert record_of(blocks).decoding != record_of(whole).decoding
    assert whole.hf_config.mask_token_id == 395  # the tokenizer's


def test_a_mask_that_the_tokenizer_does_not_name(tmp_path):
    """It is the one of the published checkpoints, which a smaller vocabulary has no room for."""
    path = copied("a2d-qwen3-tiny", tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((path / name).read_text())
        del fields["mask_token"]
        (path / name).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"A2DQwen3LMHeadModel: mask_token_id=151669 in config\.json is not valid"):
        configured(path)


def test_both_names_of_an_architecture(tmp_path):
    for name in FAMILIES["RND1"].architectures:
        model = configured(copied("rnd1-tiny", tmp_path / name, {"architectures": [name]})).model_config
        assert is_diffusion_lm(model) and record_of(model).logits_shift == 1


# -- a chat template's variables ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "served", "asked", "wanted"),
    [
        ("a2d-qwen3-tiny", None, None, {"enable_thinking": False}),
        ("a2d-qwen3-tiny", None, {"enable_thinking": True, "own": 1}, {"enable_thinking": True, "own": 1}),
        ("a2d-qwen3-tiny", {"enable_thinking": True}, None, {"enable_thinking": True}),
        ("a2d-qwen3-tiny", {"enable_thinking": True}, {"enable_thinking": False}, {"enable_thinking": False}),
        ("a2d-qwen2-tiny", None, None, None),
    ],
)
def test_a_family_has_defaults_of_its_chat_template(checkpoint, served, asked, wanted):
    """After those of the request and of the server"""
    model = configured(GOLDEN / "checkpoints" / checkpoint).model_config
    request = SimpleNamespace(chat_template_kwargs=asked)
    set_template_defaults(request, SimpleNamespace(model_config=model, default_chat_template_kwargs=served))
    assert request.chat_template_kwargs == wanted
