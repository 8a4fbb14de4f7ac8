"""Reuse policies: which rows are recomputed in which layer, and which come from earlier steps?"""

from vllm_dlm.plugins.reuse.base import Reuse

BASE = Reuse
