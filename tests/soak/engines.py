"""A pair of engines inside this process: one with hardly any memory that serves batches, one that answers alone."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.soak.requests import Model

MAX_LEN = 256
#: 39 usable blocks: a guided canvas of full length with features takes nearly all of them
TIGHT = {"block_size": 32, "num_gpu_blocks_override": 40, "max_num_batched_tokens": 512}
AMPLE = {
    "block_size": 128,
    "num_gpu_blocks_override": 24,
}  # for one request; small, since it is filled with NaN each time


@dataclass(frozen=True)
class Server:
    checkpoint: str
    dtype: str = "float32"
    dlm: dict = field(default_factory=dict)  # of --dlm-config

    @property
    def label(self) -> str:
        return Path(self.checkpoint).name


@dataclass
class Pair:
    server: Server

    @cached_property
    def tight(self):
        return start(self.server, **TIGHT)

    @cached_property
    def alone(self):
        return start(self.server, **AMPLE)

    @property
    def model(self) -> Model:
        config = self.tight.llm_engine.model_config
        return Model(MAX_LEN, config.get_vocab_size(), config.hf_config.mask_token_id)

    def started(self) -> "Pair":
        self.tight, self.alone  # noqa: B018
        return self


def start(server: Server, **settings):
    from vllm import LLM

    return LLM(
        server.checkpoint,
        dtype=server.dtype,
        max_model_len=MAX_LEN,
        enforce_eager=True,
        disable_log_stats=True,
        kv_cache_memory_bytes=1 << 27,
        max_num_seqs=64,
        additional_config={"dlm": server.dlm},
        **settings,
    )
