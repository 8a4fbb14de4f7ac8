"""Lower bounds of a step: its weights and cached keys read once at the device's bandwidth, or its multiply-adds."""

from typing import NamedTuple

from benchmarks.lib.models import ELEMENT, Shape
from vllm_dlm.step.counts import Counts


class Peaks(NamedTuple):
    """Most that the device reaches: of its datasheet if that is known, else measured."""

    bytes_per_s: float
    flops_per_s: float


class Bound(NamedTuple):
    ms: float
    by: str  # what takes longer: "bytes" or "FLOPs"


def bound(bytes_read: float, flops: float, peaks: Peaks) -> Bound:
    moving, computing = 1e3 * bytes_read / peaks.bytes_per_s, 1e3 * flops / peaks.flops_per_s
    return Bound(moving, "bytes") if moving >= computing else Bound(computing, "FLOPs")


def denoising_bound(shape: Shape, counts: Counts, peaks: Peaks) -> Bound:
    """The bound of a step with these counts (`keys_read` is summed over layers)"""
    read = shape.weight_bytes() + shape.model.kv_bytes(counts.keys_read, ELEMENT)
    return bound(read, 2 * shape.model.macs(counts), peaks)


class Reading(NamedTuple):
    """What a decoding step reads of each request in the layers that choose pages"""

    keys: int
    page_size: int
    choosing: int  # layers; the others read everything


def decoding_bound(shape: Shape, context: int, requests: int, reading: Reading | None, peaks: Peaks) -> Bound:
    """One token of each request after `context` others. Choosing reads a mean and one number per page and key head."""
    own = shape.model
    choosing, keys = (reading.choosing, min(reading.keys, context)) if reading else (0, context)
    each = (own.layers - choosing) * own.kv_bytes(context, ELEMENT) + choosing * own.kv_bytes(keys, ELEMENT)
    if reading:
        each += choosing * -(-context // reading.page_size) * own.kv_heads * (own.head_dim * ELEMENT + 4)
    seen = (own.layers - choosing) * context + choosing * keys
    weights = own.layers * shape.layer_weights + shape.head_weights
    flops = 2 * requests * (weights + 2 * own.heads * own.head_dim * seen)
    return bound(shape.weight_bytes() + requests * each, flops, peaks)
