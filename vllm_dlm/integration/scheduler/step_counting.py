"""Adds steps to the counters that an engine reports."""

from vllm_dlm.canvas.canvas import Canvas
from vllm_dlm.client_cache import CacheUsage
from vllm_dlm.step.counts import Counts, ModelShape, StepCounts


def count_step(counts: StepCounts, canvas: Canvas, pressure: float) -> None:
    """Counts a step of the canvas, before its commit is applied."""
    counts.denoising_steps += 1
    counts.canvas_positions += canvas.block_width
    counts.rows_live += canvas.streams * len(canvas.plan.live)
    counts.rows_dense += canvas.streams * canvas.rows
    counts.refresh_steps += canvas.plan.refresh or canvas.plan.whole(canvas.rows)
    counts.lowered_steps += canvas.options.decoding.threshold_floor is not None and pressure > 0


def count_delivery(counts: StepCounts, canvas: Canvas, tokens: int) -> None:
    """Counts delivered tokens. vLLM counts the pass that commits a block as an additional step of that block, and its
    benchmark subtracts these passes."""
    counts.denoising_steps += 1
    counts.canvas_positions += canvas.block_width
    counts.committed_tokens += tokens


def count_work(counts: StepCounts, work: Counts, caches: dict[str, CacheUsage], shape: ModelShape) -> None:
    """Counts the worker's work in one step. `caches`: caches of its process"""
    counts.rows_recomputed += work.rows["feed_forward"] // shape.layers
    counts.kv_bytes_read += shape.kv_bytes(work.keys_read)
    counts.kv_bytes_dense += shape.kv_bytes(work.keys_dense)
    counts.caches = caches
