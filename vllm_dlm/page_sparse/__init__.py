"""Page-sparse decoding of autoregressive models with standard attention. Prompts read everything; generated positions
read the pages that the server's selection chooses.

- `layer_backends` gives attention layers their backend, `cpu` or `cuda`.
- `partition` decides which rows of a step choose pages, `queries` chooses them.
- `cpu_pages` runs vLLM's CPU kernels over pages.
- `summaries` stores the summaries of pages next to the KV cache.

vllm_dlm/integration/worker/selecting_worker.py adds all of this to vLLM's workers, and
vllm_dlm/integration/autoregressive.py decides when page-sparse decoding is active and what is rejected.
"""
