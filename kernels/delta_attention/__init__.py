"""How much moved values move a context: sum over changed keys j of A[i, j] * dV[j].

A is the softmax over all keys. DyLLM adds this to the cached context of rows
that are not recomputed, which leaves out that A itself has changed. Keys are
given side by side, or read where they lie in the KV cache.
"""

from vllm_dlm.kernels.delta_attention.dispatch import delta_attention, delta_over_pages

__all__ = ["delta_attention", "delta_over_pages"]
