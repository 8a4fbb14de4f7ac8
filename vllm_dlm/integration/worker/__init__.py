"""vLLM's workers with the denoising runner in them, or with summaries of pages."""
