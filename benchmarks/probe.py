"""Looks inside an engine's worker: where a step's time goes, how many rows and FLOPs it takes.

The functions travel to the worker with `LLM.collective_rpc`. FLOPs are
counted where the rows arrive, at every linear layer and at attention, so a
policy cannot claim a saving that does not happen. The hooks stay in during
timed runs; they cost a few microseconds per linear, at the engine's expense.
"""

import functools
import sys
import time
from collections import Counter

#: per step, in the worker: the forward and the head are "the model", all else is overhead
TIMED = ("forward", "head", "worker")


def install(worker) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_dlm.engine.attention import CanvasAttention

    runner = worker.model_runner
    counts = worker.dlm_counts = Counter()

    def timed(name, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                counts[name] += time.perf_counter() - begin

        return wrapper

    def count_step(function):
        @functools.wraps(function)
        def wrapper(scheduler_output, *args, **kwargs):
            counts["steps"] += bool(scheduler_output.num_scheduled_tokens)
            counts["step_requests"] += len(scheduler_output.num_scheduled_tokens)
            return function(scheduler_output, *args, **kwargs)

        return wrapper

    module = sys.modules[type(runner).__module__]
    module.denoise = timed("forward", module.denoise)  # embedding to the last layer
    runner.head.run = timed("head", runner.head.run)  # final norm, logits, token and confidence
    runner.execute_model = count_step(timed("worker", runner.execute_model))

    def linear(layer, args, _):
        rows = args[0].numel() // args[0].shape[-1]
        counts["flops"] += 2 * rows * layer.input_size_per_partition * layer.output_size_per_partition

    def feed_forward(layer, args, _):
        counts["rows"] += len(args[0])

    def head(layer, args, _):
        counts["head_rows"] += len(args[1])
        counts["flops"] += 2 * args[1].numel() * layer.vocab_size

    for layer in runner.model.modules():
        if isinstance(layer, LinearBase):
            layer.register_forward_hook(linear)
    for layer in runner.model.model.layers:
        layer.mlp["gate_up_proj"].register_forward_hook(feed_forward)
    runner.model.logits_processor.register_forward_hook(head)

    attend = CanvasAttention.__call__

    def counted_attention(self, q, k, v):
        pairs = sum(a * b for a, b in zip(self.q_lens, self.kv_lens, strict=True))
        counts["flops"] += 4 * pairs * q.shape[1] * q.shape[2]
        return attend(self, q, k, v)

    CanvasAttention.__call__ = counted_attention


def take(worker) -> dict[str, float]:
    """What was counted since the last call."""
    counts = dict(worker.dlm_counts)
    worker.dlm_counts.clear()
    return counts


def threads(worker) -> int:
    import torch

    return torch.get_num_threads()
