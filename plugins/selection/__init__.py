"""Selections choose the cached keys that a query reads."""

from vllm_dlm.plugins.selection.base import Selection

BASE = Selection
