"""Selections: which cached keys may a query read?"""

from vllm_dlm.plugins.selection.base import Selection

BASE = Selection
