"""vLLM's FlashAttention over packed queries without a causal mask, as one operator.

The definition is that of varlen_attention, over keys that lie side by side or
in pages.
"""

from vllm_dlm.kernels.flash_attention.dispatch import flash_attention, has_flash

__all__ = ["flash_attention", "has_flash"]
