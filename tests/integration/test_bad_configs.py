"""A config.json that is wrong in one field is refused by the front-end, in one line that names the field.

`make test` calls the function that decides. `make test-slow` also starts vLLM's front-end for each of them.
"""

import json

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from tests.conftest import GOLDEN
from tests.integration.bad_checkpoints import (
    A2D_LLAMA,
    A2D_QWEN2,
    A2D_QWEN3,
    ARCHITECTURE,
    DIFFCODER,
    DREAM,
    FAST_V2,
    LLADA,
    LLADA2,
    MOE,
    RND1,
    SDAR,
    copied,
    refused_config,
)
from tests.page_sparse.models import write
from vllm_dlm.families.config import check_config
from vllm_dlm.families.family import imported
from vllm_dlm.integration.dispatch import family_of

#: fields that need not be there: what the files of a family leave to its tokenizer or code, or to another family
UNSAID = {
    MOE: ("mask_token_id", "architectures"),
    LLADA2: ("mask_token_id", "eos_token_id", "architectures", "block_size"),
    A2D_QWEN3: ("mask_token_id",),
    A2D_QWEN2: ("mask_token_id",),
    A2D_LLAMA: ("mask_token_id",),
    DIFFCODER: ("mask_token_id", "architectures"),  # without the architecture it is an autoregressive Llama
    FAST_V2: ("mask_token_id", "bd_size"),
}


LLAMA_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip
SIZES = {
    LLADA: ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "max_sequence_length"),
    DREAM: (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "max_position_embeddings", "vocab_size",
    ),
    MOE: (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "expert_intermediate_size",
        "num_experts", "num_experts_per_tok", "max_position_embeddings", "vocab_size",
    ),
    SDAR: (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "max_position_embeddings", "vocab_size", "block_size",
    ),
    LLADA2: (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "moe_intermediate_size", "num_experts", "num_experts_per_tok", "num_shared_experts", "n_group", "topk_group",
        "max_position_embeddings", "vocab_size", "block_size",
    ),
    A2D_QWEN3: LLAMA_SIZES,
    A2D_QWEN2: LLAMA_SIZES,
    A2D_LLAMA: LLAMA_SIZES,
    RND1: (*LLAMA_SIZES, "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    DIFFCODER: LLAMA_SIZES,
    FAST_V2: (*LLAMA_SIZES, "bd_size"),
}  # fmt: skip
TOKENS = ("mask_token_id", "eos_token_id")
NUMBERS = ("rope_theta", "rms_norm_eps")

MISSING = [
    (name, field, {field: None})
    for name in SIZES
    for field in (*SIZES[name], *NUMBERS, *TOKENS, "architectures")
    if field not in UNSAID.get(name, ())
] + [(LLADA, "vocab_size", {"vocab_size": None, "embedding_size": None})]

WRONG = [
    (name, field, {field: value})
    for name in SIZES
    for fields, values in (
        (SIZES[name], (0, -1, "x", 1.5, True)),
        (NUMBERS, (0, -1.0, "x", float("inf"))),
        (TOKENS, ("2", -1, 512, 1.5, [3])),
    )
    for field in fields
    for value in values
] + [
    (LLADA, "n_heads", {"n_heads": 3}),
    (LLADA, "n_heads", {"n_heads": 128}),  # heads of one channel, which rotary embedding cannot pair
    (LLADA, "n_kv_heads", {"n_kv_heads": 3}),
    (LLADA, "n_kv_heads", {"n_kv_heads": 0}),
    (LLADA, "embedding_size", {"embedding_size": "512"}),
    (LLADA, "vocab_size", {"embedding_size": None, "vocab_size": -1}),
    (LLADA, "eot_token_id", {"eot_token_id": 512}),
    (LLADA, "weight_tying", {"weight_tying": "yes"}),
    (LLADA, "dtype", {"torch_dtype": "nope"}),
    (LLADA, "architectures", {"architectures": ["NobodysModelLM"]}),
    (LLADA, "architectures", {"architectures": ["LlamaForCausalLM"]}),
    (LLADA, "block_type", {"block_type": "sequential"}),
    (LLADA, "unique", {"unique": 3}),
    (DREAM, "num_key_value_heads", {"num_key_value_heads": 3}),
    (DREAM, "tie_word_embeddings", {"tie_word_embeddings": "yes"}),
    (DREAM, "head_dim", {"head_dim": 33}),
    (LLADA, "head_dim", {"head_dim": -32}),
    (DREAM, "rope_type", {"rope_scaling": "linear"}),
    (DREAM, "hidden_act", {"hidden_act": "gelu"}),
    (MOE, "num_experts_per_tok", {"num_experts_per_tok": 17}),
    (MOE, "moe_layer_freq", {"moe_layer_freq": [0, 1, 1, 1]}),
    (MOE, "moe_layer_freq", {"moe_layer_freq": 2}),
    (MOE, "norm_topk_prob", {"norm_topk_prob": True}),
    (MOE, "moe_router_score_function", {"moe_router_score_function": "sigmoid"}),
    (MOE, "moe_router_enable_expert_bias", {"moe_router_enable_expert_bias": True}),
    (MOE, "shared_expert_intermediate_size", {"shared_expert_intermediate_size": 64}),
    (MOE, "router_num_group", {"router_num_group": 4}),
    (MOE, "routed_scaling_factor", {"routed_scaling_factor": 2.5}),
    (MOE, "qk_layernorm", {"qk_layernorm": False}),
    (MOE, "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    (MOE, "rope_type", {"rope_scaling": "linear"}),
    (SDAR, "use_regular_causal", {"use_regular_causal": True}),
    (SDAR, "attention_bias", {"attention_bias": True}),
    (SDAR, "use_sliding_window", {"use_sliding_window": True}),
    (SDAR, "rope_type", {"rope_scaling": "linear"}),
    (LLADA2, "n_group", {"n_group": 5}),
    (LLADA2, "n_group", {"n_group": 16}),
    (LLADA2, "topk_group", {"topk_group": 5}),
    (LLADA2, "num_experts_per_tok", {"num_experts_per_tok": 9}),
    (LLADA2, "first_k_dense_replace", {"first_k_dense_replace": -1}),
    (LLADA2, "first_k_dense_replace", {"first_k_dense_replace": None}),
    (LLADA2, "routed_scaling_factor", {"routed_scaling_factor": 0}),
    (LLADA2, "partial_rotary_factor", {"partial_rotary_factor": 1.5}),
    (LLADA2, "score_function", {"score_function": "softmax"}),
    (LLADA2, "use_qk_norm", {"use_qk_norm": False}),
    (LLADA2, "expert_capacity", {"expert_capacity": 48}),
    (A2D_QWEN3, "block_size", {"block_size": 0}),
    (A2D_QWEN3, "block_size", {"block_size": "32"}),
    (A2D_QWEN3, "layer_types", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    (A2D_QWEN3, "attention_bias", {"attention_bias": True}),
    (A2D_QWEN3, "use_sliding_window", {"use_sliding_window": True}),
    (A2D_QWEN2, "block_size", {"block_size": -4}),
    (A2D_QWEN2, "use_sliding_window", {"use_sliding_window": True}),
    (A2D_LLAMA, "mlp_bias", {"mlp_bias": True}),
    (A2D_LLAMA, "rope_type", {"rope_scaling": "llama3"}),
    (RND1, "is_causal", {"is_causal": True}),
    (RND1, "sliding_window", {"sliding_window": 4096}),
    (RND1, "rope_type", {"rope_scaling": "linear"}),
    (RND1, "num_experts_per_tok", {"num_experts_per_tok": 9}),
    (RND1, "decoder_sparse_step", {"decoder_sparse_step": 2}),
    (RND1, "mlp_only_layers", {"mlp_only_layers": [0]}),
    (DIFFCODER, "block_size", {"block_size": 0}),
    (DIFFCODER, "attention_bias", {"attention_bias": True}),
    (DIFFCODER, "mlp_bias", {"mlp_bias": True}),
    (DIFFCODER, "rope_type", {"rope_scaling": "linear"}),
    (FAST_V2, "use_sliding_window", {"use_sliding_window": True}),
    (FAST_V2, "rope_type", {"rope_scaling": "linear"}),
]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """As vLLM's front-end does before it reads a config.json"""
    load_general_plugins()


def refused_by_check(name: str, changed: dict) -> str:
    """The decision alone, on config.json as vLLM reads it."""
    # The mask may be the tokenizer's, which is looked up before.
    given = {"mask_token_id": 7} if "mask_token_id" in UNSAID.get(name, ()) else {}
    given |= json.loads((GOLDEN / "checkpoints" / name / "config.json").read_text()) | changed
    given = {field: value for field, value in given.items() if value is not None}
    family = family_of(given, {})
    config = (imported(family.config) if family else _CONFIG_REGISTRY[given["model_type"]]).from_dict(given)
    with pytest.raises(ValueError) as refused:
        check_config(config)
    return str(refused.value)


@pytest.mark.parametrize("name, field, config", MISSING + WRONG)
def test_a_field_of_config_json(name, field, config):
    assert_named(refused_by_check(name, config), name, field, config)


def test_what_llada2_2_needs_is_named():
    line = refused_by_check(LLADA2, {"expert_capacity": 48})
    assert "experts for whole blocks" in line and "delete and split positions" in line


#: one case of each family in `make test`, too
AT_START = [
    case if case[1:] == ("rope_theta", {"rope_theta": None}) else pytest.param(*case, marks=pytest.mark.slow)
    for case in MISSING + WRONG
]


@pytest.mark.parametrize("name, field, config", AT_START)
def test_a_field_of_config_json_at_the_start(tmp_path, name, field, config):
    assert_named(refused_config(copied(name, tmp_path, config)), name, field, config)


def assert_named(line: str, name: str, field: str, config: dict) -> None:
    assert line.startswith(f"{ARCHITECTURE[name]}: ")
    assert f" {field}" in line and "config.json" in line
    value = config.get(field, config.get("rope_scaling", config.get("torch_dtype")))
    assert f"{field}={value!r}" in line or (value is None and f"has no {field}" in line)


def test_a_mask_that_no_file_names(tmp_path):
    """It is that of the checkpoints there are, which is none of a smaller vocabulary."""
    line = refused_config(copied(MOE, tmp_path, {"mask_token_id": None}))
    assert line.startswith("LLaDAMoEModelLM: mask_token_id=156895 in config.json is not valid")


@pytest.mark.parametrize("wrong", [{"budget_tokens": -1}, {"std_kind": "l3"}, {"page_size": "64"}])
def test_a_selection_of_config_json(tmp_path, wrong):
    (field,) = wrong
    path = copied(LLADA, tmp_path, {"unique": wrong})
    line = refused_config(path, additional_config={"dlm": {"selection": {"name": "unique"}}})
    assert line.startswith(f"config.json: unique: {field}: {wrong[field]!r}") and "dlm" not in line
    # without that selection they decide nothing
    for dlm in ({}, {"selection": {"name": "none"}}):
        AsyncEngineArgs(str(path), max_model_len=128, additional_config={"dlm": dlm}).create_engine_config()
    named = {"selection": {"name": "unique"} | wrong}
    line = refused_config(path, additional_config={"dlm": named})
    assert line.startswith(f"--dlm-config: dlm.selection.{field}")


@pytest.mark.parametrize("other", [{"reuse": {"name": "nope"}}, 3])
def test_what_is_wrong_beside_a_selection_of_config_json(tmp_path, other):
    line = refused_config(copied(LLADA, tmp_path, {"unique": {}}), additional_config={"dlm": other})
    assert line.startswith("--dlm-config: dlm")


def test_fields_that_may_be_left_out(tmp_path):
    left_out = {"n_kv_heads": None, "vocab_size": None, "weight_tying": None, "use_cache": None, "pad_token_id": None}
    config = AsyncEngineArgs(str(copied(LLADA, tmp_path, left_out)), max_model_len=128).create_engine_config()
    hf = config.model_config.hf_config
    assert (hf.num_key_value_heads, hf.vocab_size, hf.tie_word_embeddings) == (4, 512, False)
    path = copied(DREAM, tmp_path, {"rope_scaling": None, "tie_word_embeddings": None})
    hf = AsyncEngineArgs(str(path), max_model_len=128).create_engine_config().model_config.hf_config
    assert hf.tie_word_embeddings is False


def test_what_hf_overrides_mend(tmp_path):
    path = copied(LLADA, tmp_path, {"mask_token_id": "2", "n_heads": None, "n_kv_heads": 2, "architectures": None})
    mended = {"mask_token_id": 392, "n_heads": 4, "architectures": ["LLaDAModelLM"]}
    config = AsyncEngineArgs(str(path), max_model_len=128, hf_overrides=mended).create_engine_config()
    assert config.model_config.hf_config.num_attention_heads == 4


def test_a_context_that_no_model_was_trained_on_is_not_the_default(tmp_path):
    """Dream's config.json has Qwen2's, of which a step of one canvas alone would take ten gigabytes."""
    path = copied(DREAM, tmp_path, {"max_position_embeddings": 131072})
    for asked, served in ((None, 2048), (4096, 4096)):
        config = AsyncEngineArgs(str(path), max_model_len=asked).create_engine_config()
        assert config.model_config.max_model_len == served
        assert served <= config.scheduler_config.max_num_batched_tokens < 131072


@pytest.fixture(scope="module")
def autoregressive(tmp_path_factory):
    return write("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    "part, dlm", [("decoding", {"decoding": {"name": "entropy"}}), ("reuse", {"reuse": {"name": "fast_dllm"}})]
)
def test_options_of_another_kind_of_model(autoregressive, part, dlm):
    line = refused_config(autoregressive, additional_config={"dlm": dlm}, skip_tokenizer_init=True)
    assert line.startswith(f"--dlm-config: dlm.{part}: ")
