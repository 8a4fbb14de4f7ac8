"""What becomes of a step that goes wrong: the requests it concerns fail, the engine goes on.

A step writes to the blocks of its own requests only, so whatever goes wrong in
it leaves nothing half written that anybody else reads. What cannot be survived
is raised: errors of the accelerator, which poison its process, and any error
inside a forward that other ranks take part in, who would wait for this one.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


class Failures(dict[str, str]):
    """request -> why it cannot go on"""

    @contextmanager
    def of(self, *req_ids: str, in_forward: bool = False) -> Iterator[None]:
        """An exception of this block is the failure of these requests."""
        try:
            yield
        except Exception as error:
            if poisons(error) or (in_forward and get_tensor_model_parallel_world_size() > 1):
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
