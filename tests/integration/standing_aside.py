"""Run by test_patches.py: a process in which vLLM, or another plugin, is not what this plugin expects."""

import json
import sys
from pathlib import Path

from tests.integration.serving import CHECKPOINT

#: remote code of a checkpoint, which vLLM's Transformers backend would take for an autoregressive model's
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "sdar"

class SDARForCausalLM(LlamaForCausalLM):
    config_class = Config
    _supports_attention_backend = True
"""


def lose_an_attribute() -> None:
    from vllm.engine.arg_utils import EngineArgs

    del EngineArgs.from_cli_args


def another_plugin() -> None:
    """Serves LLaDA's architecture, and reads its config.json, with classes of its own."""
    from transformers import AutoConfig, LlamaConfig
    from vllm.model_executor.models import ModelRegistry

    class TheirConfig(LlamaConfig):
        model_type = "llada"

    AutoConfig.register("llada", TheirConfig)
    ModelRegistry.register_model("LLaDAModelLM", "vllm.model_executor.models.llama:LlamaForCausalLM")


def renamed(autoregressive: str, name: str, **fields) -> str:
    """The autoregressive checkpoint with other fields in its config.json"""
    folder = Path(autoregressive).with_name(name)
    folder.mkdir(exist_ok=True)
    config = json.loads((Path(autoregressive) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    (folder / "remote.py").write_text(REMOTE_CODE)
    return str(folder)


def main(autoregressive: str, lose: bool, generate: bool, another: bool) -> None:
    if lose:
        lose_an_attribute()
    if another:
        another_plugin()
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    settings = {
        "max_model_len": 128,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 24,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }

    def configured(model: str, **more) -> str | list[str]:
        """Why the model is refused, or the classes that serve it"""
        try:
            config = AsyncEngineArgs(model, **settings, **more).create_engine_config()
        except (ValueError, RuntimeError) as error:
            return str(error)
        return [type(config.model_config.hf_config).__name__, config.parallel_config.worker_cls]

    answer = {"flags": AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).format_help()}
    if generate:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
        (output,) = LLM(autoregressive, **settings).generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
        answer["tokens"] = output.outputs[0].token_ids
    else:
        AsyncEngineArgs(autoregressive, **settings).create_engine_config()
    answer["patched"] = [
        f"{module}.{name}.{attribute}"
        for module in [module for module in sys.modules if module.startswith("vllm.")]
        for name, cls in vars(sys.modules[module]).items()
        if isinstance(cls, type)
        for attribute, value in list(vars(cls).items())
        if getattr(getattr(value, "__func__", value), "_dlm", False)
    ]
    answer["diffusion model"] = configured(str(CHECKPOINT))
    auto_map = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.SDARForCausalLM"}
    remote = renamed(autoregressive, "remote", model_type="sdar", architectures=["SDARForCausalLM"], auto_map=auto_map)
    answer["remote code"] = configured(remote, trust_remote_code=True)
    if not another:
        another_plugin()
    theirs = renamed(autoregressive, "theirs", model_type="llada", architectures=["LLaDAModelLM"])
    answer["another plugin's"] = configured(theirs)
    print(f"answer: {json.dumps(answer)}")


if __name__ == "__main__":
    main(sys.argv[1], "lose" in sys.argv, "generate" in sys.argv, "another" in sys.argv)
