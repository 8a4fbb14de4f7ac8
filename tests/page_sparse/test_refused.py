"""Options that page-sparse decoding does not support fail before an engine process starts, in a line with the field."""

import json
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.page_sparse.conftest import SPARSE, decode, prompts, tokens
from vllm_dlm.configuration import selection_of
from vllm_dlm.integration import registration
from vllm_dlm.page_sparse import layer_backends
from vllm_dlm.plugins.selection.unique import Unique

#: text in the message -> the dlm object
OBJECTS = {
    "dlm.decoding": {"decoding": {"name": "low_confidence"}, "selection": SPARSE},
    "dlm.reuse": {"reuse": {"name": "none"}},
    "dlm.canvas": {"canvas": {"max": 64}},
    "dlm.selection.name": {"selection": {"name": "wavefilter"}},
    "nope": {"selection": {"name": "nope"}},
    "dlm.selection.page_size": {"selection": SPARSE | {"page_size": 48}},
    "dlm.selection.budget_tokens": {"selection": SPARSE | {"budget_tokens": 32}},
    "dlm.selection.dense_layers": {"selection": SPARSE | {"dense_layers": [0, 1, 2, 3]}},
    "selectio": {"selectio": SPARSE},
    "dlm: 3": 3,
}


@pytest.mark.parametrize("field", OBJECTS)
def test_dlm_objects(checkpoints, field):
    with pytest.raises(ValueError, match=field):
        LLM(str(checkpoints("llama")), max_model_len=512, additional_config={"dlm": OBJECTS[field]})


SETTINGS = {
    "kv_cache_dtype": {"kv_cache_dtype": "fp8"},
    "kv_transfer_config": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "speculative_config": {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}},
    "worker_cls": {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
    "attention_backend": {"attention_backend": "TRITON_ATTN"},
    "64 does not divide block_size 32; use a multiple of 64": {"block_size": 32},
    "does not generate": {"runner": "pooling"},
}


@pytest.mark.parametrize("field", SETTINGS)
def test_settings(checkpoints, field):
    settings = SETTINGS[field]
    if "speculative_config" in settings:
        settings = {"speculative_config": settings["speculative_config"] | {"model": str(checkpoints("llama"))}}
    selection = SPARSE | {"page_size": 64, "budget_tokens": 256}
    with pytest.raises(ValueError, match=field):
        LLM(
            str(checkpoints("llama")),
            max_model_len=512,
            additional_config={"dlm": {"selection": selection}},
            **settings,
        )


def given(**changed):
    arguments = {
        "prefix": "model.layers.5.attn",
        "head_size": 64,
        "head_size_v": None,
        "alibi_slopes": None,
        "use_alibi_sqrt": None,
        "logits_soft_cap": None,
        "extra_impl_args": {},
        "attn_backend": None,
        "attn_type": "decoder",
        "per_layer_sliding_window": None,
        "cache_config": SimpleNamespace(sliding_window=None),
    }
    return arguments | changed


@pytest.mark.parametrize(
    "name, value",
    [
        ("logits_soft_cap", 30.0),
        ("alibi_slopes", [0.5]),
        ("head_size_v", 32),
        ("extra_impl_args", {"sinks": torch.ones(4)}),
    ],
)
def test_layers(name, value):
    with pytest.raises(ValueError, match="sinks" if name == "extra_impl_args" else name) as refused:
        layer_backends.refuse(given(**{name: value}))
    assert "model.layers.5.attn" in str(refused.value)


@pytest.mark.parametrize(
    "name, dtype, size, capability",
    [
        (r"dtype \(float32\).* give float16 or bfloat16 as dtype", torch.float32, 128, (9, 0)),
        (r"head_size \(100\)", torch.bfloat16, 100, (9, 0)),
        (r"compute capability \(7.5\)", torch.float16, 128, (7, 5)),
    ],
)
def test_what_the_kernels_of_a_gpu_do_not_take(name, dtype, size, capability):
    chosen = AttentionBackendEnum.FLASH_ATTN.get_class()
    layer_backends.refuse_kernel(chosen, given(head_size=128), torch.bfloat16, DeviceCapability(8, 0))
    with pytest.raises(ValueError, match=rf"model\.layers\.5\.attn has {name}"):
        layer_backends.refuse_kernel(chosen, given(head_size=size), dtype, DeviceCapability(*capability))


def test_layers_without_any_of_it():
    layer_backends.refuse(given(logits_soft_cap=0, extra_impl_args={"sinks": None}))


@pytest.mark.parametrize(
    "changed, wanted",
    [
        ({}, True),
        ({"prefix": "model.layers.1.attn"}, False),
        ({"per_layer_sliding_window": 512}, False),
        ({"cache_config": SimpleNamespace(sliding_window=512)}, False),
        ({"attn_backend": object}, False),
        ({"attn_type": "encoder_only"}, False),
    ],
)
def test_which_layers_choose(changed, wanted):
    assert layer_backends.wants_selection(given(**changed), Unique(dense_layers=(0, 1))) is wanted


def test_options_of_requests(decoder):
    """Without a selection they are what they are to vLLM alone: names that nobody reads."""
    params = SamplingParams(max_tokens=2, extra_args={"dlm_threshold": 0.5, "dlm_frames": 1}, detokenize=False)
    decoder("llama").generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    with pytest.raises(ValueError, match="dlm_threshold"):
        decoder("llama", SPARSE).generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)


@pytest.mark.parametrize("dlm", [None, {}, {"selection": {"name": "none"}}])
def test_without_a_selection_nothing_of_ours_is_there(decoder, dlm):
    llm = decoder("llama", **({} if dlm is None else {"additional_config": {"dlm": dlm}}))
    asked = prompts(60)
    assert tokens(decode(llm, asked)) == tokens(decode(decoder("llama"), asked))
    (found,) = llm.collective_rpc(used)
    assert not any("vllm_dlm" in name for name in found)


def test_a_model_trained_with_a_selection(checkpoints, tmp_path_factory):
    """A downloaded config.json turns nothing on. Its fields are the defaults of a selection that the server names."""
    from vllm.engine.arg_utils import EngineArgs

    folder = tmp_path_factory.mktemp("trained")
    for file in checkpoints("llama").iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    trained = {"budget_tokens": 128, "page_size": 32, "temperature": 1.0}
    (folder / "config.json").write_text(json.dumps(config | {"unique": trained}))

    def configured(dlm=None):
        """The engine's configuration, and its warnings about the checkpoint"""
        additional = {} if dlm is None else {"additional_config": {"dlm": dlm}}
        with patch.object(registration.logger, "warning_once") as warned:
            arguments = EngineArgs(str(folder), max_model_len=512, skip_tokenizer_init=True, **additional)
            config = arguments.create_engine_config()
        return config, [call.args[0] for call in warned.call_args_list]

    for dlm in (None, {}):
        config, warnings = configured(dlm)
        assert selection_of(config) is None and not config.parallel_config.worker_cls.startswith("vllm_dlm.")
        assert set(warnings) == {warnings[0]} and "config.json: unique: " in warnings[0]
        assert """enable it with --dlm-config '{"selection": {"name": "unique"}}'""" in warnings[0]
    config, warnings = configured({"selection": {"name": "none"}})
    assert selection_of(config) is None and not warnings
    config, warnings = configured({"selection": {"name": "unique", "page_size": 16}})
    assert (selection_of(config).budget_tokens, selection_of(config).page_size) == (128, 16) and not warnings
    assert config.parallel_config.worker_cls.startswith("vllm_dlm.")


def used(worker) -> list[str]:
    context = worker.vllm_config.compilation_config.static_forward_context
    return [type(worker).__module__] + [type(layer.impl).__module__ for layer in context.values()]
