"""Decoding: which masked positions are filled now, and with what?"""

from vllm_dlm.plugins.decoding.base import Decoding

BASE = Decoding
