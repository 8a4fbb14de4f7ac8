"""`python -m vllm_dlm.demo`: serves the bundled checkpoint and shows how its answers fill in."""
