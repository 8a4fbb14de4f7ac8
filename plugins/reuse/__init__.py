"""Reuse policies choose the rows that each layer recomputes. The others come from earlier steps."""

from vllm_dlm.plugins.reuse.base import Reuse

BASE = Reuse
