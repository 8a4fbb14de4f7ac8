"""The low-pass band of keys along the sequence, for any orthogonal wavelet, periodic at the ends.

The Haar wavelet does not need it: its bands are means of runs (`haar_pyramid`).
Longer filters reach over the borders of runs, so what remains of a sequence
after some of it was left out has to be transformed anew.
"""

from vllm_dlm.kernels.wavelet_lowpass.dispatch import lowpass

__all__ = ["lowpass"]
