"""How probable a given continuation is: by Monte Carlo over its masks, or exactly, in one or more steps.

A score consists of ordinary requests of the engine whose tokens are known beforehand (vllm_dlm/scored.py): they share
its batches with requests that generate, and the answer comes back as vLLM's own log-probabilities.
"""
