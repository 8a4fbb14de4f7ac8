"""vLLM's code for GPUs on a machine without one: `python -m tests.pretended_gpu [PART …]`, `make pretend`.

A process is told that it has a Hopper GPU before it imports vLLM (hopper.py). What vLLM has compiled for it is
replaced by definitions in torch under the schemas that the libraries of 0.32 and 0.33 register (operators.py);
tensors lie on the CPU. Configuration, platform, workers, runners, attention backends and their builders are vLLM's own
code for CUDA, and so are the arguments that reach the operators. Not seen this way: kernels, streams and graphs.

`make pretend VLLM=FOLDER` takes vLLM's Python files from FOLDER/vllm, say from an unpacked wheel of another version.
"""
