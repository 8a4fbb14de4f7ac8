"""Decodings: which masked positions does a step fill, and with which tokens?"""

from vllm_dlm.plugins.decoding.base import Decoding

BASE = Decoding
