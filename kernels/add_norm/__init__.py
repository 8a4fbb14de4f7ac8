"""What a part of a layer adds to the residual stream, and the sum normalised for the next part, in one launch.

With s = x + added, rounded as the stream is: h = s / sqrt(mean(s^2) + eps) * weight.
"""

from vllm_dlm.kernels.add_norm.dispatch import add_norm

__all__ = ["add_norm"]
