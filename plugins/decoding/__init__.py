"""Decodings choose the masked positions that a step fills, and their tokens."""

from vllm_dlm.plugins.decoding.base import Decoding

BASE = Decoding
