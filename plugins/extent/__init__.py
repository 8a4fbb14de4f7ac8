"""Extent methods: how many positions after the current canvas block take part in a step?"""

from vllm_dlm.plugins.extent.base import Extent

BASE = Extent
