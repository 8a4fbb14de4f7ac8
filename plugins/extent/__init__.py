"""Extent methods limit the number of positions after the current canvas block that take part in a step."""

from vllm_dlm.plugins.extent.base import Extent

BASE = Extent
