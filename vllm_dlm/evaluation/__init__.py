"""Runs EleutherAI's lm-evaluation-harness against a running server: `python -m vllm_dlm.evaluation`."""
