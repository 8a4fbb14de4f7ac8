"""Recipes of sparsity-aware training on the demo's recall task, and what they are worth.

python -m examples.training.diffusion --mask soft      # LLaDA's loss on the demo checkpoint
python -m examples.training.causal --mask soft         # next-token loss, the same weights as a causal model
python -m examples.training.recovery                   # accuracy at a small budget before and after each
python -m benchmarks memory                            # peak memory against dense attention
"""
