"""Kernels, one folder per operation: naive.py is the reference, torch.py and triton.py are the fast paths, dispatch.py
picks one of them and documents inputs and outputs.

triton.py holds the GPU kernels, which need only torch and Triton. Launchers
depend on shapes alone: they fetch no value from the device, and grids and sizes
do not depend on contents, so a launch can be captured in a CUDA graph and
replayed. Shared helpers are in triton_utils.py. Each call is one PyTorch
operator of the namespace `vllm_dlm` (operators.py). The last dimension of an
input must be contiguous, and integers have 32 or 64 bits.

Without a GPU, tests run the kernels with Triton's interpreter against the
naive definitions and compile them ahead of time for the GPUs listed in
tests/kernels/test_triton_compile.py. For tests on a GPU see
tests/kernels/test_on_cuda.py.
"""
