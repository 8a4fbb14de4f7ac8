"""Errors of a step: the requests that they concern fail, and the engine goes on.

A step writes to the KV blocks of its own requests only, so an error leaves
nothing half written that another request reads. Errors of the accelerator are
raised, since its process cannot be used any more.

With tensor parallelism all ranks must fail the same requests: each rank decides
alone, and a rank that leaves a request out would take part in collectives of
another size. Outside of a forward ranks agree. What they run there (plans,
streams, packing, choosing tokens) reads nothing but vLLM's schedule, the
canvases and what the head proposes, which are the same on all ranks, and shapes
of one rank's share, which are equal. So an error of this code is raised on all
of them. Two kinds of errors may be one rank's alone and are raised: those of a
forward, in which the other ranks wait for this one, and a lack of memory.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only

OUT_OF_MEMORY = MemoryError, torch.OutOfMemoryError


class Failures(dict[str, str]):
    """request -> why it cannot go on"""

    def __init__(self, ranks: int = 1):
        """`ranks`: how many of them must agree, those of tensor parallelism"""
        super().__init__()
        self.ranks = ranks

    @contextmanager
    def catch(self, *req_ids: str, in_forward: bool = False) -> Iterator[None]:
        """An exception of this block is the failure of these requests."""
        try:
            yield
        except Exception as error:
            of_one_rank = in_forward or isinstance(error, OUT_OF_MEMORY)
            if poisons(error) or (of_one_rank and self.ranks > 1):
                raise
            logger.debug("A step failed", exc_info=True)
            self.update(dict.fromkeys(req_ids, describe(error)))


def poisons(error: Exception) -> bool:
    """Whether the process is of no use any more. (Of memory there may be enough for the next step.)"""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def describe(error: Exception) -> str:
    """One line: what, and where."""
    (*_, (frame, line)) = traceback.walk_tb(error.__traceback__)
    message = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {message} ({frame.f_code.co_qualname}, line {line})"
