"""Isolation of the live view from serving: an error in the view only ends the view of a request.

Serving calls only `isolated` methods of the view. An exception in one of them is logged once per object and disables
the object. Its `fail` method determines what is sent instead of frames.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger

from vllm_dlm.step.failures import describe, poisons

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only

Method = TypeVar("Method", bound=Callable[..., Any])

#: "module:Class.method" -> method, for all isolated methods; tests make each of them raise
ENTRY_POINTS: dict[str, Any] = {}


class Isolated:
    """An object of the view. `fault`: why it is disabled."""

    fault: str | None = None

    @property
    def subject(self) -> str:
        """Name of the object in log messages"""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        self.fault = log_fault(self.subject, error)


def log_fault(subject: str, error: Exception) -> str:
    fault = describe(error)
    logger.error("The view of %s failed; serving continues: %s", subject, fault)
    return fault


def isolated(method: Method) -> Method:
    """Decorator for methods of Isolated that serving calls. They never raise, and return None after an error."""

    def handle(self: Isolated, error: Exception) -> None:
        if poisons(error):  # the device can run no further step
            raise error
        self.fail(error)

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if self.fault is not None:
            return None
        try:
            return guarded.__wrapped__(self, *args, **kwargs)
        except Exception as error:
            return handle(self, error)

    @functools.wraps(method)
    async def guarded_async(self, *args, **kwargs):
        if self.fault is not None:
            return None
        try:
            return await guarded_async.__wrapped__(self, *args, **kwargs)
        except Exception as error:
            return handle(self, error)

    wrapper: Any = guarded_async if inspect.iscoroutinefunction(method) else guarded
    ENTRY_POINTS[f"{method.__module__}:{method.__qualname__}"] = wrapper
    return wrapper


def error_message(fault: str) -> dict:
    """Message that is sent instead of further frames"""
    return {"error": {"message": f"The view of this request failed; its answer is not affected: {fault}"}}
