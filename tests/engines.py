"""Engines inside the test process. A checkpoint is loaded once per set of vLLM's settings, whatever its options.

vLLM is not started a second time, and tests can look into the worker; the server tests and the tensor-parallel test
cover vLLM's multiprocess mode. Options of `--dlm-config` are not part of a loaded model: engines that differ in
nothing else share one, and an engine puts its own options in place when it is used.
"""

import ctypes
import json
import time
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def start_engine(checkpoint: str, **kwargs):
    import torch
    from vllm import LLM

    from vllm_dlm.integration.worker import runner

    # The same layout of caches on every CPU; tests/engine/test_cache_layouts.py is about the other one.
    runner.layout_for = lambda *shape: None
    settings = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 27,
        "max_num_seqs": 64,
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():  # other processes may use the GPU, too: the share vLLM needs to start
        settings["gpu_memory_utilization"] = 0.05
    path = GOLDEN / "checkpoints" / checkpoint
    settings["skip_tokenizer_init"] = not (path / "tokenizer_config.json").exists()
    return LLM(str(path), **(settings | kwargs))


#: Engines whose KV cache may take memory. Others give it back to the system, and read zeros when they are used again.
KEEP_MEMORY = 4
MADV_REMOVE = 9  # of Linux: frees the pages of shared memory, which is what the KV cache of a CPU lies in


class Engines:
    """engines(name, **settings) -> a running engine."""

    def __init__(self):
        self.started: dict[str, object] = {}
        self.seconds: dict[str, float] = {}  # how long each start took
        self.recent: list = []  # those with memory; the one used last comes last

    def __call__(self, checkpoint: str, **settings):
        additional = settings.pop("additional_config", {})
        key = json.dumps([checkpoint, settings], sort_keys=True)
        if key not in self.started:
            began = time.monotonic()
            self.started[key] = start_engine(checkpoint, additional_config=additional, **settings)
            self.seconds[key] = time.monotonic() - began
        abort_leftovers(self.started[key].llm_engine)
        return EngineWithOptions(self, self.started[key], additional.get("dlm"))

    def use(self, llm) -> None:
        self.recent = [*(other for other in self.recent if other is not llm), llm]
        while len(self.recent) > KEEP_MEMORY:
            release(self.recent.pop(0))


def abort_leftovers(engine) -> None:
    """Aborts requests of a test that failed, which would fail the tests after it, too."""
    if engine.has_unfinished_requests():
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        engine.step()


def release(llm) -> None:
    """Frees the memory of an engine's KV cache. Nothing must be left in it that a later request would look for."""
    assert not llm.llm_engine.has_unfinished_requests()
    llm.dlm_used_by = None  # whoever uses it next resets its prefix cache
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    for cache in worker.model_runner.kv_caches:
        if cache.device.type == "cpu":
            storage = cache.untyped_storage()
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), MADV_REMOVE
            )


class EngineWithOptions:
    """vLLM's `LLM` as if it had been started with these options. The model, worker and KV cache are shared."""

    def __init__(self, engines: Engines, llm, dlm: dict | None):
        self._engines, self._llm, self._dlm = engines, llm, dlm
        self._use()  # wrong options are refused as at a start

    def __getattr__(self, name: str):
        if vars(self._llm).get("dlm_used_by") is not self:
            self._use()
        return getattr(self._llm, name)

    def _use(self) -> None:
        from vllm_dlm.configuration import resolved_options
        from vllm_dlm.integration.registration import blamed, set_block_size
        from vllm_dlm.options import OptionError

        engine = self._llm.llm_engine
        assert not engine.has_unfinished_requests(), "options cannot change while requests are running"
        processor, core = engine.input_processor, engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        config, model = processor.vllm_config, self._llm.model_config
        before = config.additional_config
        config.additional_config = {} if self._dlm is None else {"dlm": self._dlm}
        try:
            options = resolved_options(config)
            set_block_size(config.cache_config, options.selection)
        except OptionError as error:
            message = blamed(config, error)
            config.additional_config = before
            raise ValueError(message) from None
        # Whether a block-causal model shares prefixes was decided when it started, and depends on this option.
        width = model.dlm_options.decoding.block_length
        assert options.attention == "full" or options.decoding.block_length == width
        for other in (config, core.vllm_config, core.scheduler.vllm_config, runner.vllm_config):
            other.additional_config, other.model_config.dlm_options = config.additional_config, options
        model.dlm_options = options
        # depends on the options and is kept: see vllm_dlm/request/served_model.py
        vars(processor).pop("dlm_model", None)
        self._llm.default_sampling_params = None
        assert core.scheduler.reset_prefix_cache()
        self._engines.use(self._llm)
        self._llm.dlm_used_by = self
