"""Residual addition and RMS normalization of the sum, in one launch.

With s = x + added, rounded to the dtype of the residual stream: h = s / sqrt(mean(s^2) + eps) * weight.
"""

from vllm_dlm.kernels.add_norm.dispatch import add_norm

__all__ = ["add_norm"]
