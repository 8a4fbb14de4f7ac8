"""Recipes of sparsity-aware training on the demo's recall task, and what they are worth.

python -m benchmarks.train.diffusion --mask soft      # LLaDA's loss on the demo checkpoint
python -m benchmarks.train.causal --mask soft         # next-token loss, the same weights as a causal model
python -m benchmarks.train.recovery                   # accuracy at a small budget before and after each
python -m benchmarks.train.memory                     # peak memory against dense attention
"""
