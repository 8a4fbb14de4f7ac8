"""Extent: how far behind the current block do rows of the canvas live?"""

from vllm_dlm.plugins.extent.base import Extent

BASE = Extent
