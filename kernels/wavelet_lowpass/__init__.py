"""Low-pass band of keys along the sequence, for any orthogonal wavelet, periodic at the ends.

The Haar wavelet does not need this kernel: its bands are means of runs
(`haar_pyramid`). Longer filters cross the borders of runs, so after parts of a
sequence are left out, the rest must be transformed again.
"""

from vllm_dlm.kernels.wavelet_lowpass.torch import lowpass

__all__ = ["lowpass"]
