"""Log-probability of a given continuation: by Monte Carlo over its masks, or exactly, in one or more steps.

A score consists of ordinary engine requests with known tokens (options/scored.py). They share batches with requests
that generate, and the result is returned in vLLM's own log-probabilities.
"""
