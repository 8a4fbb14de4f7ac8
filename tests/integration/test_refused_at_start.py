"""What cannot be served stops before an engine process is started, with one line that names the field."""

import json
import shutil

import pytest
from vllm import LLM
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.conftest import GOLDEN
from tests.integration.refusals import line_of
from tests.integration.serving import CHECKPOINT

# -- engine arguments ------------------------------------------------------------------------

ARGUMENTS = {
    "enable_lora": True,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
    "pipeline_parallel_size": 2,
    "kv_cache_dtype": "fp8",
    "logits_processors": ["package:Processor"],
    "logprobs_mode": "processed_logprobs",
    "diffusion_config": {"canvas_length": 8},
    "runner": "pooling",
}


@pytest.mark.parametrize("field", ARGUMENTS)
def test_engine_arguments_that_cannot_be_honoured(field):
    with pytest.raises(ValueError, match=field) as refused:
        LLM(str(CHECKPOINT), max_model_len=512, **{field: ARGUMENTS[field]})
    assert field in line_of(refused.value)


@pytest.mark.parametrize("field", ["enable_prefix_caching", "enable_chunked_prefill", "async_scheduling"])
def test_features_that_are_switched_on_in_vain(parse, field):
    flag = f"--{field.replace('_', '-')}"
    for start in (
        lambda: LLM(str(CHECKPOINT), max_model_len=512, **{field: True}),
        lambda: AsyncEngineArgs.from_cli_args(parse(flag)).create_engine_config(),
    ):
        with pytest.raises(ValueError, match=f"{field}: not supported with masked-diffusion language models"):
            start()
    off = AsyncEngineArgs.from_cli_args(parse(f"--no-{field.replace('_', '-')}"))
    for _ in range(2):  # vLLM writes its defaults into the arguments
        config = off.create_engine_config()
        assert config.cache_config.enable_prefix_caching is False and config.scheduler_config.async_scheduling is False


@pytest.mark.parametrize("checkpoint, width", [("sdar-tiny", 4), ("llada2-tiny", 32)])
def test_prefix_caching_of_models_that_know_blocks(checkpoint, width):
    """On unless it is switched off, where the hash of a block tells all that its keys depend on."""

    def cached(**given):
        path = str(GOLDEN / "checkpoints" / checkpoint)
        made = AsyncEngineArgs(model=path, skip_tokenizer_init=True, max_model_len=512, **given).create_engine_config()
        return made.cache_config.enable_prefix_caching

    wide = {"additional_config": {"dlm": {"decoding": {"block_length": 24}}}}
    assert cached() and cached(enable_prefix_caching=True) and cached(block_size=width)
    assert not cached(enable_prefix_caching=False)
    assert not cached(**wide) and cached(block_size=48, **wide)
    with pytest.raises(
        ValueError, match="enable_prefix_caching: block_size must be a multiple of the canvas block length"
    ):
        cached(enable_prefix_caching=True, **wide)


# -- the dlm object --------------------------------------------------------------------------

#: what the message names -> the object
WRONG = {
    "nam": {"decoding": {"nam": 1}},
    "decodin": {"decodin": {}},
    "dlm.decoding.name": {"decoding": {"name": "nope"}},
    "dlm.reuse.name": {"reuse": {"name": "nope"}},
    "dlm.selection.name": {"selection": {"name": 3}},
    "dlm.decoding.steps": {"decoding": {"steps": 0}},
    "dlm.decoding.block_length": {"decoding": {"name": "entropy", "block_length": "8"}},
    "dlm.decoding.threshold": {"decoding": {"name": "random", "threshold": 0.5}},
    "reuse": {"reuse": "none"},
    "dlm.canvas.max": {"canvas": {"max": 0}},
    "dlm.canvas.default": {"canvas": {"default": 64, "max": 32}},
}


@pytest.mark.parametrize("field", WRONG)
def test_additional_config_that_is_wrong(field):
    with pytest.raises(ValueError, match=field) as refused:
        LLM(str(CHECKPOINT), max_model_len=512, additional_config={"dlm": WRONG[field]})
    assert field in line_of(refused.value)


@pytest.fixture(scope="module")
def parse():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())

    def parse(*arguments: str):
        return parser.parse_args(["--model", str(CHECKPOINT), "--max-model-len", "512", *arguments])

    return parse


@pytest.mark.parametrize("field", WRONG)
def test_a_dlm_config_that_is_wrong(parse, capsys, field):
    with pytest.raises(SystemExit):
        parse("--dlm-config", json.dumps(WRONG[field]))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--dlm-config" in last and field in last


@pytest.mark.parametrize("text", ["{not json", "[]", "3", ""])
def test_a_dlm_config_that_is_no_object(parse, capsys, text):
    with pytest.raises(SystemExit):
        parse("--dlm-config", text)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--dlm-config" in last and "JSON" in last


def test_another_plugin_than_this_one(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--plugin", "another")
    assert "--plugin" in capsys.readouterr().err.strip().splitlines()[-1]


def test_two_dlm_objects_at_once(parse):
    arguments = parse("--dlm-config", "{}", "--additional-config", '{"dlm": {}}')
    with pytest.raises(ValueError, match="--dlm-config"):
        AsyncEngineArgs.from_cli_args(arguments)


@pytest.mark.parametrize("plugin", [(), ("--plugin", "vllm_dlm")], ids=["without the flag", "with the flag"])
def test_the_plugin_is_active_with_and_without_its_flag(parse, plugin):
    config = AsyncEngineArgs.from_cli_args(parse(*plugin)).create_engine_config()
    assert config.scheduler_config.scheduler_cls.startswith("vllm_dlm.")
    assert config.parallel_config.worker_cls.startswith("vllm_dlm.")
    assert config.model_config.get_diff_sampling_param()["temperature"] == 0


def test_a_dlm_config_reaches_the_engine(parse):
    given = {"decoding": {"name": "entropy", "steps": 64}}
    arguments = parse("--dlm-config", json.dumps(given), "--additional-config", '{"other": 1}')
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.additional_config == {"other": 1, "dlm": given}


def test_a_field_of_the_other_familys_default_is_refused_once_the_model_is_known(parse):
    """`eps` belongs to Dream's default decoding; the flag alone does not tell the model."""
    arguments = parse("--dlm-config", '{"decoding": {"eps": 0.01}}')
    with pytest.raises(ValueError, match="eps") as refused:
        AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    assert "dlm.decoding.eps" in line_of(refused.value)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), 32),  # of the checkpoint's generation_config.json
        (("--generation-config", "vllm"), 256),  # of the family
        (("--dlm-config", '{"canvas": {"default": 100}}'), 100),
        (("--dlm-config", '{"canvas": {"max": 20}}'), 20),
        (("--dlm-config", '{"canvas": {"default": 100, "max": 200}}', "--generation-config", "vllm"), 100),
        (("--generation-config", str(CHECKPOINT)), 32),
    ],
)
def test_the_canvas_of_requests_that_name_none(parse, flags, wanted):
    model = AsyncEngineArgs.from_cli_args(parse(*flags)).create_engine_config().model_config
    assert model.get_diff_sampling_param()["max_tokens"] == wanted
    # what vLLM would take for a bound to requests that do
    assert "max_new_tokens" not in model.override_generation_config


# -- checkpoints -----------------------------------------------------------------------------

LLADA = {
    "alibi": True,
    "mask_token_id": None,
    "block_type": "sequential",
    "rope": False,
    "layer_norm_type": "default",
    "activation_type": "swiglu",
    "rope_theta": None,
    "eos_token_id": None,
    "n_heads": 7,
}
DREAM = {
    "mask_token_id": None,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "use_sliding_window": True,
}


def edited(checkpoint, tmp_path, field: str, value) -> str:
    shutil.copytree(checkpoint, tmp_path / "edited")
    path = tmp_path / "edited/config.json"
    config = json.loads(path.read_text())
    config[field] = value
    if value is None:
        del config[field]
    path.write_text(json.dumps(config))
    return str(tmp_path / "edited")


@pytest.mark.parametrize("field", LLADA)
def test_a_llada_checkpoint_that_would_run_wrongly(tmp_path, field):
    named = "heads" if field == "n_heads" else field
    with pytest.raises(ValueError, match=named) as refused:
        LLM(edited(CHECKPOINT, tmp_path, field, LLADA[field]), max_model_len=256)
    assert named in line_of(refused.value)


@pytest.mark.parametrize("value", [-1, 10**6])
def test_a_mask_token_outside_the_vocabulary(tmp_path, value):
    with pytest.raises(ValueError, match="mask_token_id") as refused:
        LLM(edited(CHECKPOINT, tmp_path, "mask_token_id", value), max_model_len=256)
    assert "mask_token_id" in line_of(refused.value)


@pytest.mark.parametrize("field", DREAM)
def test_a_dream_checkpoint_that_would_run_wrongly(tmp_path, field):
    checkpoint = edited(GOLDEN / "checkpoints/dream-tiny", tmp_path, field, DREAM[field])
    named = "rope" if field == "rope_scaling" else field
    with pytest.raises(ValueError, match=named) as refused:
        LLM(checkpoint, max_model_len=128)
    assert named in line_of(refused.value)
