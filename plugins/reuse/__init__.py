"""Reuse: which rows are recomputed in which layer, and which come from the last steps?"""

from vllm_dlm.plugins.reuse.base import Reuse

BASE = Reuse
