"""The denoising engine as vLLM runs it: scheduler, worker and runner."""
