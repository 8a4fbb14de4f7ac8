"""`python -m vllm_dlm.demo`: serves the bundled checkpoint and shows its answers fill in."""
