import pytest
import pywt
import torch

from vllm_dlm.kernels.wavelet_lowpass import lowpass, naive


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "sym4", "coif1"])
def test_band_is_that_of_pywavelets(wavelet, level):
    keys = torch.randn(2, 96, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(level))
    taps = tuple(pywt.Wavelet(wavelet).dec_lo)
    want = torch.from_numpy(pywt.wavedec(keys.numpy(), wavelet, level=level, axis=-2, mode="periodization")[0])
    torch.testing.assert_close(naive.lowpass(keys, taps, level), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lowpass(keys, taps, level).double(), want, atol=2e-6, rtol=2e-6)
