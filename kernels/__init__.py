"""One folder per operation: naive.py (the truth), torch.py and triton.py (fast paths), and dispatch.py between them,
which says what goes in and comes out.

triton.py holds the kernels for GPUs, of torch and Triton alone. Their launchers
know nothing but shapes: they fetch no value from the device, grids and sizes
are the same for other contents, so that a launch can be captured in a graph and
replayed. What they share is in triton_utils.py. To PyTorch each call is one
operator of the namespace `vllm_dlm` (operators.py), so fake tensors and
compilers get through. Without a GPU they are run by
Triton's interpreter against the naive definitions and compiled ahead of time
for the GPUs that tests/kernels/test_triton_compile.py names.
"""
