"""Isolation of the live view from serving: a fault in the view ends what onlookers see of a request, nothing else.

Serving enters the view through `isolated` methods only. An exception in one of them is logged, once for each object,
and the object does nothing from then on. Its `fail` says what the onlookers are sent instead of frames.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.logger import init_logger

from vllm_dlm.step.failures import describe, poisons

logger = init_logger(f"vllm.{__name__}")  # vLLM configures loggers under its own name only

Method = TypeVar("Method", bound=Callable[..., Any])

#: "module:Class.method" -> the method, for all isolated methods; tests make each of them raise
ENTRY_POINTS: dict[str, Any] = {}


class Isolated:
    """An object that serves onlookers. `fault` is why it stopped."""

    fault: str | None = None

    @property
    def subject(self) -> str:
        """What the log line names"""
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        self.fault = log_fault(self.subject, error)


def log_fault(subject: str, error: Exception) -> str:
    fault = describe(error)
    logger.error("The view of %s ends, serving goes on: %s", subject, fault)
    return fault


def isolated(method: Method) -> Method:
    """A method of an Isolated that serving calls: it never raises, and returns None after a fault."""

    def handle(self: Isolated, error: Exception) -> None:
        if poisons(error):  # no step can follow on this device, whatever caused it
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
    """What onlookers get in the place of further frames"""
    return {"error": {"message": f"The view of this request ended, its answer is not affected: {fault}"}}
