"""Selection: which cached keys may a query see?"""

from vllm_dlm.plugins.selection.base import Selection

BASE = Selection
