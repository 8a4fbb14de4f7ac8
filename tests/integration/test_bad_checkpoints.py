"""A checkpoint that is wrong in one thing is refused at the start in one line that names the thing.

Configurations are refused by the front-end. Tensors are refused by the process that loads them: here the worker
of the session's engine, which reads the wrong checkpoint beside its own model.
"""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.conftest import GOLDEN
from tests.integration.refusals import line_of
from tests.page_sparse.models import write
from vllm_dlm.models import checkpoint

LLADA, DREAM, MOE, SDAR, LLADA2 = "llada-tiny", "dream-tiny", "lladamoe-tiny", "sdar-tiny", "llada2-tiny"
ARCHITECTURE = {
    LLADA: "LLaDAModelLM", DREAM: "DreamModel", MOE: "LLaDAMoEModelLM", SDAR: "SDARForCausalLM",
    LLADA2: "LLaDA2MoeModelLM",
}  # fmt: skip
#: fields that need not be there: what the files of a family leave to its tokenizer or code, or to another family
UNSAID = {
    MOE: ("mask_token_id", "architectures"),
    LLADA2: ("mask_token_id", "eos_token_id", "architectures", "block_size"),
}


def copied(name: str, folder, config=None, tensors=None):
    """The checkpoint with some fields changed (None: left out) and `tensors` applied to its weights."""
    path = folder / name
    shutil.copytree(GOLDEN / "checkpoints" / name, path)
    if config is not None:
        fields = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    if tensors is not None:
        weights = load_file(path / "model.safetensors")
        tensors(weights)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


# -- config.json -----------------------------------------------------------------------------

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
]  # fmt: skip


def refused_config(path, **settings) -> str:
    with pytest.raises(ValueError) as refused:
        AsyncEngineArgs(str(path), max_model_len=128, **settings).create_engine_config()
    return line_of(refused.value).removeprefix("  Value error, ")


@pytest.mark.parametrize("name, field, config", MISSING + WRONG)
def test_a_field_of_config_json(tmp_path, name, field, config):
    line = refused_config(copied(name, tmp_path, config))
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


# -- tensors ---------------------------------------------------------------------------------


def names(name: str) -> list[str]:
    """A checkpoint's own names of its tensors, of one layer and one expert of many."""
    with safe_open(GOLDEN / "checkpoints" / name / "model.safetensors", "pt") as file:
        keys = file.keys()
        return sorted(key for key in keys if not {"0", "1", "3", *map(str, range(4, 16))} & set(key.split(".")))


TENSORS = [(name, tensor) for name in ARCHITECTURE for tensor in names(name)]


def load(worker, path: str, updates=(), **settings):
    """Loads a checkpoint as a worker does -> (error, warnings, the names it must have)."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    arguments = {"max_model_len": 128, "dtype": "float32"} | settings
    config = AsyncEngineArgs(path, **arguments).create_engine_config()
    with patch.object(checkpoint.logger, "warning") as warned, set_current_vllm_config(config):
        try:
            model = get_model(vllm_config=config)
            for update in updates:
                model.load_weights(update)
        except ValueError as error:
            return str(error), warned, None
    return None, warned, model.checkpoint.wanted


@pytest.fixture
def loaded(engines):
    def loaded(path, **settings):
        (outcome,) = engines(LLADA).collective_rpc(load, args=(str(path),), kwargs=settings)
        return outcome

    return loaded


@pytest.fixture
def refused(loaded):
    def refused(path, name: str, tensor: str, **settings) -> str:
        error, _, _ = loaded(path, **settings)
        assert error is not None and "\n" not in error
        assert error.startswith(f"{ARCHITECTURE[name]}: ") and tensor in error
        return error

    return refused


@pytest.mark.parametrize("name, tensor", TENSORS)
def test_a_tensor_is_missing(tmp_path, refused, name, tensor):
    line = refused(copied(name, tmp_path, tensors=lambda t: t.pop(tensor)), name, tensor)
    assert line.endswith(f": 1 tensor missing from the checkpoint: {tensor}")


def test_many_tensors_are_missing(tmp_path, refused):
    def without_layers(tensors):
        for key in [key for key in tensors if ".blocks." in key]:
            del tensors[key]

    line = refused(copied(LLADA, tmp_path, tensors=without_layers), LLADA, "blocks.0")
    assert "36 tensors missing" in line and line.endswith("and 32 more") and len(line) < 400


@pytest.mark.parametrize("name, tensor", TENSORS)
def test_a_tensor_has_another_shape(tmp_path, refused, name, tensor):
    found, expected = [], []

    def cut(tensors):
        expected.extend(tensors[tensor].shape)
        tensors[tensor] = tensors[tensor][: expected[0] // 2].clone()
        found.extend(tensors[tensor].shape)

    line = refused(copied(name, tmp_path, tensors=cut), name, tensor)
    assert f"{tensor} in the checkpoint is {found}" in line and line.endswith(str(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name, tensor", [(LLADA, "model.transformer.blocks.2.up_proj.weight"), (DREAM, "model.norm.weight")]
)
def test_a_value_is_not_a_number(tmp_path, refused, name, tensor, value):
    def spoil(tensors):
        tensors[tensor].view(-1)[7] = value

    assert "NaN or infinite" in refused(copied(name, tmp_path, tensors=spoil), name, tensor)


def test_a_value_is_too_large_for_the_dtype(tmp_path, loaded, refused):
    tensor = "model.layers.2.mlp.up_proj.weight"

    def enlarge(tensors):
        tensors[tensor][3, 4] = -70000

    path = copied(DREAM, tmp_path, tensors=enlarge)
    line = refused(path, DREAM, tensor, dtype="float16")
    assert "7e+04" in line and "torch.float16" in line
    assert loaded(path, dtype="bfloat16")[0] is None


@pytest.mark.parametrize("config", [None, {"torch_dtype": "float32"}], ids=["dtype of the file", "of config.json"])
@pytest.mark.parametrize("bytes_left", [0, 100, 1_000_000])
def test_a_file_is_truncated(tmp_path, bytes_left, config):
    """Seen by the front-end, if the checkpoint lies in a folder."""
    path = copied(LLADA, tmp_path, config)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    line = refused_config(path)
    assert line.startswith(f"LLaDAModelLM: {file} cannot be read, the file may be incomplete: ")


def test_a_file_turns_out_to_be_truncated_when_its_tensors_are_read(engines):
    def tensors():
        yield "model.transformer.ln_f.weight", torch.ones(128)
        raise SafetensorError("incomplete metadata\nmore of it")

    (error,) = engines(LLADA).collective_rpc(read, args=(tensors(),))
    assert error.startswith("LLaDAModelLM: checkpoint some/where cannot be read, the file may be incomplete: ")
    assert error.endswith("incomplete metadata")


def read(worker, tensors) -> str:
    model = worker.model_runner.model
    described = checkpoint.Checkpoint(model, model.hf_to_vllm_mapper, "LLaDAModelLM", "some/where")
    with pytest.raises(ValueError) as refused:
        list(described.checked(tensors))
    return str(refused.value)


def in_two_files(path):
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    keys = sorted(tensors)
    halves = {"model-1.safetensors": keys[:20], "model-2.safetensors": keys[20:]}
    for file, part in halves.items():
        save_file({key: tensors[key] for key in part}, path / file, metadata={"format": "pt"})
    index = {"weight_map": {key: file for file, part in halves.items() for key in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return keys


def test_one_of_two_files_is_missing(tmp_path, loaded, refused):
    path = copied(LLADA, tmp_path)
    keys = in_two_files(path)
    assert loaded(path)[0] is None
    (path / "model-2.safetensors").unlink()
    (path / "model.safetensors.index.json").unlink()  # vLLM would name the file
    assert f"{len(keys) - 20} tensors missing" in refused(path, LLADA, "model.transformer.")


def test_a_width_that_is_not_the_tensors(tmp_path, refused):
    line = refused(copied(LLADA, tmp_path, {"mlp_hidden_size": 512}), LLADA, "model.transformer.blocks.0.ff_")
    assert line.endswith(("is [256, 128], and by config.json it must be [512, 128]", "must be [128, 512]"))


# -- what is right ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LLADA, "llada-tiny-gqa", DREAM, MOE, SDAR, LLADA2])
def test_the_names_follow_from_the_model(loaded, name):
    path = GOLDEN / "checkpoints" / name
    error, warned, wanted = loaded(path)
    assert error is None and not warned.called
    assert {key: list(tensor.shape) for key, tensor in wanted.items()} == {
        key: list(tensor.shape) for key, tensor in load_file(path / "model.safetensors").items()
    }


@pytest.mark.parametrize("stored", [True, False], ids=["stored twice", "stored once"])
@pytest.mark.parametrize(
    "name, field, head",
    [(LLADA, "weight_tying", "model.transformer.ff_out.weight"), (DREAM, "tie_word_embeddings", "lm_head.weight")],
)
def test_a_tied_head(tmp_path, loaded, name, field, head, stored):
    tensors = None if stored else (lambda tensors: tensors.pop(head))
    error, warned, wanted = loaded(copied(name, tmp_path, {field: True}, tensors))
    assert error is None and not warned.called
    # vLLM takes a model for untied whose checkpoint has a head of that name
    assert (head in wanted) == (stored and head == "lm_head.weight")


def test_a_tied_head_does_not_stand_for_its_embedding(tmp_path, refused):
    embedding = "model.transformer.wte.weight"
    refused(copied(LLADA, tmp_path, {"weight_tying": True}, lambda tensors: tensors.pop(embedding)), LLADA, embedding)


def test_tensors_nobody_uses_are_named_in_one_warning(tmp_path, loaded):
    extra = {
        "model.transformer.blocks.0.q_norm.weight": torch.ones(32),
        "model.transformer.blocks.0.q_proj.bias": torch.ones(128),
        "vision.weight": torch.full((2,), float("nan")),
        "model.transformer.blocks.0.rotary_emb.inv_freq": torch.ones(16),  # derived: dropped in silence, as by vLLM
    }
    error, warned, _ = loaded(copied(LLADA, tmp_path, tensors=lambda tensors: tensors.update(extra)))
    assert error is None
    ((line, *values),) = [call.args for call in warned.call_args_list]
    assert "3 tensors" in line % tuple(values)
    assert [key in line % tuple(values) for key in extra] == [True, True, True, False]


def test_dummy_weights_and_what_replaces_them_piece_by_piece(tmp_path, loaded):
    path = copied(LLADA, tmp_path)
    tensors = load_file(path / "model.safetensors").items()
    # (vLLM's CPU workers replace matrices by packed ones, which cannot be loaded again.)
    pieces = [[(key, tensor)] for key, tensor in tensors if tensor.ndim == 1]
    (path / "model.safetensors").unlink()
    assert loaded(path, load_format="dummy", updates=pieces)[0] is None
    wrong = [[("model.transformer.ln_f.weight", torch.ones(3))]]
    assert "model.transformer.ln_f.weight" in loaded(path, load_format="dummy", updates=wrong)[0]


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTISED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "model.transformer.ff_out"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def quantised(tensors):
    """Every linear layer as integers with one scale per channel."""
    for key in [k for k in tensors if ("blocks." in k or "layers." in k) and tensors[k].ndim == 2]:
        weight = tensors.pop(key)
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[key], tensors[f"{key}_scale"] = (weight / scale).round().to(torch.int8), scale


@pytest.mark.parametrize("name", [LLADA, DREAM])
def test_a_quantised_checkpoint(tmp_path, loaded, name):
    error, warned, _ = loaded(copied(name, tmp_path, {"quantization_config": QUANTISED}, quantised))
    assert error is None and not warned.called


@pytest.mark.parametrize(
    "name, module",
    [
        (LLADA, "model.transformer.blocks.2.up_proj."),
        (LLADA, "model.transformer.blocks.2.attn_norm."),
        (DREAM, "model.layers.2.self_attn.q_proj."),
        (DREAM, "model.layers.2.self_attn.q_proj.bias"),
    ],
)
def test_a_module_of_a_quantised_checkpoint_is_missing(tmp_path, refused, name, module):
    def without(tensors):
        quantised(tensors)
        for key in [key for key in tensors if key.startswith(module)]:
            del tensors[key]

    refused(copied(name, tmp_path, {"quantization_config": QUANTISED}, without), name, module)
