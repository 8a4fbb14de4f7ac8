"""Change of an attention context caused by changed values: sum over changed keys j of A[i, j] * dV[j].

A is the softmax over all keys. DyLLM adds this to the cached context of rows
that are not recomputed, and so ignores that A itself has changed. Keys are
passed as one tensor (`delta_attention`) or read from the KV cache
(`delta_over_pages`).
"""

from vllm_dlm.kernels.delta_attention.dispatch import delta_attention, delta_over_pages

__all__ = ["delta_attention", "delta_over_pages"]
