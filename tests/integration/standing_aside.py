"""Run by test_patches.py, as processes where something of vLLM is not what the plugin knows."""

import json
import sys

from tests.integration.serving import CHECKPOINT


def lose_an_attribute() -> None:
    from vllm.engine.arg_utils import EngineArgs

    del EngineArgs.from_cli_args


def main(autoregressive: str, lose: bool, generate: bool) -> None:
    if lose:
        lose_an_attribute()
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    settings = {
        "max_model_len": 128, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24, "dtype": "float32",
        "skip_tokenizer_init": True, "disable_log_stats": True,
    }  # fmt: skip
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
    try:
        AsyncEngineArgs(str(CHECKPOINT), max_model_len=128).create_engine_config()
    except ValueError as error:
        answer["refused"] = str(error)
    print(f"answer: {json.dumps(answer)}")


if __name__ == "__main__":
    main(sys.argv[1], "lose" in sys.argv, "generate" in sys.argv)
