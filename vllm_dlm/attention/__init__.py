"""Page-sparse decoding of autoregressive models: any decoder of vLLM's, its prompts read whole, its generated
positions reading the pages that the server's selection chooses.

`layers` gives attention layers a backend, `cpu` and `cuda` are those backends,
`plan` says which rows of a step choose, `rows` lets them choose, `packed` runs vLLM's CPU kernels over pages,
`statistics` keeps what is known of pages beside the KV cache, and `worker`
puts it all into vLLM's workers. What is refused, and when any of this is
active, is in vllm_dlm/integration/autoregressive.py.
"""
