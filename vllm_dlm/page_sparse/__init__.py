"""Page-sparse decoding of autoregressive models: any decoder of vLLM's, its prompts read whole, its generated
positions reading the pages that the server's selection chooses.

`layer_backends` gives attention layers a backend, `cpu` and `cuda` are those backends, `partition` says which rows of a
step choose, `queries` lets them choose, `cpu_pages` runs vLLM's CPU kernels over pages, `summaries` keeps what is
known of pages beside the KV cache, and `selecting_worker` puts it all into vLLM's workers. What is refused, and when
any of this is active, is in vllm_dlm/integration/autoregressive.py.
"""
