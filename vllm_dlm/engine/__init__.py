"""The denoising engine: scheduler, worker, runner and what a step is made of."""
