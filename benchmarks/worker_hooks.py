"""Looks inside an engine's worker: where a step's time goes, how many rows and FLOPs it takes.

The functions travel to the worker with `LLM.collective_rpc`. FLOPs are
counted where the rows arrive, at every linear layer and at attention, so a
policy cannot claim a saving that does not happen. The hooks stay in during
timed runs; they cost a few microseconds per linear, at the engine's expense.
"""

import functools
import time
from collections import Counter

#: counted by the engine itself
SELECTED = ("keys_read", "keys_dense", "keys_scored", "summaries")


def install(worker) -> None:
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_dlm.step import denoiser
    from vllm_dlm.step.attention import CanvasAttention

    runner = worker.model_runner
    worker.dlm_awaited, worker.dlm_delivered, worker.dlm_taken = (0, 0), Counter(), {}
    counts = worker.dlm_counts = Counter()  # "forward" and "head" are the model, the rest of "worker" is overhead

    def timed(name, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                counts[name] += time.perf_counter() - begin

        return wrapper

    def stepped(function):
        @functools.wraps(function)
        def wrapper(scheduler_output, *args, **kwargs):
            result = function(scheduler_output, *args, **kwargs)
            counts["steps"] += bool(scheduler_output.num_scheduled_tokens)
            for name in SELECTED:
                counts[name] += getattr(getattr(result, "counts", None), name, 0)
            if worker.dlm_taken is None and delivered(worker, result):
                worker.dlm_taken = dict(counts)
            return result

        return wrapper

    denoiser.denoise = timed("forward", denoiser.denoise)  # embedding to the last layer
    head_of = runner.denoiser.head
    head_of.read = timed("head", head_of.read)  # final norm, logits, token and confidence
    runner.execute_model = stepped(timed("worker", runner.execute_model))

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

    def joined_heads(layer):
        heads = layer.heads

        def wrapper(names, h):
            made = heads(names, h)
            counts["flops"] += sum(2 * x.numel() for x in made) * h.shape[1]
            return made

        layer.heads = wrapper

    for layer in runner.model.model.layers:
        if layer.joined is not None:  # else they are linear layers of their own
            joined_heads(layer)
        layer.mlp.register_forward_hook(feed_forward)
    runner.model.logits_processor.register_forward_hook(head)

    def counted(name, cost):
        attend = getattr(CanvasAttention, name)

        def wrapper(self, q, rows, *args):
            counts["flops"] += cost(pairs(rows.counts, self.group.kv_lens), rows, *args) * q.shape[1] * q.shape[2]
            return attend(self, q, rows, *args)

        setattr(CanvasAttention, name, wrapper)

    def pairs(q_lens, kv_lens):
        return sum(a * b for a, b in zip(q_lens, kv_lens, strict=True))

    counted("over_new", lambda seen, *_: 4 * seen)
    counted("over_pages", lambda seen, *_: 4 * seen)
    counted("delta_over_pages", lambda seen, rows, _, changed, __: 2 * seen + 2 * pairs(rows.counts, changed.counts))

    from vllm_dlm.step import selection

    attend_chosen = selection.sparse_attention

    def over_chosen(q, starts, pages, table, chosen, kv_lens, unit, scale, causal, ends, *args):
        keys = ((chosen[:, 0] >= 0).sum(-1) * unit).minimum(kv_lens)
        counts["flops"] += 4 * int((keys * (ends - starts)).sum()) * q[0].numel()
        return attend_chosen(q, starts, pages, table, chosen, kv_lens, unit, scale, causal, ends, *args)

    selection.sparse_attention = over_chosen


def delivered(worker, output) -> bool:
    """Has each of the awaited requests handed out its awaited tokens with this step?"""
    for request, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True):
        worker.dlm_delivered[request] += len(tokens)
    requests, tokens = worker.dlm_awaited
    return sum(count >= tokens for count in worker.dlm_delivered.values()) >= requests


def start(worker, requests: int, tokens: int) -> None:
    """Counts until so many requests have so many tokens each; what the engine does before it hears of an abort
    is left out."""
    worker.dlm_counts.clear()
    worker.dlm_delivered.clear()
    worker.dlm_awaited, worker.dlm_taken = (requests, tokens), None


def take(worker) -> dict[str, float]:
    if worker.dlm_taken is None:
        raise RuntimeError(f"not delivered yet: {dict(worker.dlm_delivered)} of {worker.dlm_awaited}")
    return worker.dlm_taken


def threads(worker) -> int:
    import torch

    return torch.get_num_threads()
