"""What it takes to read a prompt: of SDAR, by width of its blocks, with nothing, part or all of it in the prefix cache.

An engine in this process, with random weights of SDAR's proportions. The
response is one canvas block, filled in one step, so that the time is that of
the prompt. Prints one JSON object a line.
"""

import json
import os
import time
from pathlib import Path

from benchmarks.checkpoints import CACHE
from benchmarks.load import Watch

CONFIG = {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2304,
    "vocab_size": 8960, "mask_token_id": 8959, "bos_token_id": 8957, "eos_token_id": 8958, "block_size": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip


def add_arguments(parser) -> None:
    parser.add_argument("--prompt", type=int, default=1024, help="tokens that prompts share")
    parser.add_argument("--rest", type=int, default=64, help="tokens behind them that they do not share")
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 32], help="of canvas blocks")
    parser.add_argument("--repetitions", type=int, default=3)


def run(args) -> None:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(
        str(folder()), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=8192,
        kv_cache_memory_bytes=1 << 30, enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip
    for width in args.widths:
        for _ in range(args.repetitions):
            llm.reset_prefix_cache()
            for seed in (1, 2, 2):  # nothing is found, then the shared part, then whole blocks of all
                prompt = stem(args.prompt) + tail(args.rest, seed)
                print(json.dumps({"block_length": width, "prompt": len(prompt)} | read(llm, prompt, width)), flush=True)


def read(llm, prompt: list[int], width: int) -> dict:
    from vllm import SamplingParams

    extra = {"dlm_block_length": width, "dlm_algorithm": "low_confidence_dynamic", "dlm_threshold": 0.0}
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args=extra)
    counts = llm.llm_engine.engine_core.engine_core.scheduler.counts
    before, start, used = counts.rows_live, time.perf_counter(), time.process_time()
    with Watch() as watch:
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {
        "cached_tokens": output.num_cached_tokens, "rows": counts.rows_live - before, "seconds": round(seconds, 4),
        "cpu_seconds": round(time.process_time() - used, 4),
        "cores_of_others": watch.others,
    }  # fmt: skip


def folder() -> Path:
    place = CACHE / "sdar-proportions"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place


def stem(count: int) -> list[int]:
    return [index * 7919 % 8900 for index in range(count)]


def tail(count: int, seed: int) -> list[int]:
    return [(index * 31 + seed * 1009) % 8900 for index in range(count)]
