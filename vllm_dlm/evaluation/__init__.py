"""EleutherAI's lm-evaluation-harness through a running server: `python -m vllm_dlm.evaluation`."""
