"""Errors of a step: the affected requests fail, and the engine continues.

A step writes only to KV blocks of its own requests, so an error leaves no
partial writes that another request reads. Errors of the accelerator are raised,
because the process can no longer use it.

With tensor parallelism all ranks must fail the same requests. Each rank decides
independently, and a rank that leaves a request out would take part in collectives
of another size. Outside of a forward the ranks agree: plans, streams, packing and
the choice of tokens depend only on vLLM's schedule, the canvases, the proposals
of the head and shapes, which are equal on all ranks. An error there occurs on all
ranks. Two kinds of errors may occur on a single rank and are raised: errors of a
forward, in which other ranks wait for this one, and out-of-memory errors.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only

OUT_OF_MEMORY = MemoryError, torch.OutOfMemoryError


class Failures(dict[str, str]):
    """request id -> error message"""

    def __init__(self, ranks: int = 1):
        """`ranks`: number of tensor-parallel ranks, which must agree"""
        super().__init__()
        self.ranks = ranks

    @contextmanager
    def catch(self, *req_ids: str, in_forward: bool = False) -> Iterator[None]:
        """An exception in this context fails these requests."""
        try:
            yield
        except Exception as error:
            of_one_rank = in_forward or isinstance(error, OUT_OF_MEMORY)
            if poisons(error) or (of_one_rank and self.ranks > 1):
                raise
            logger.debug("A step failed", exc_info=True)
            self.update(dict.fromkeys(req_ids, describe(error)))


def poisons(error: Exception) -> bool:
    """Whether the process can no longer use the accelerator. (After an out-of-memory error the next step may
    succeed.)"""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def describe(error: Exception) -> str:
    """Error and location in one line."""
    (*_, (frame, line)) = traceback.walk_tb(error.__traceback__)
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} ({frame.f_code.co_qualname}, line {line})"
