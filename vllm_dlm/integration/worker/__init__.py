"""vLLM's workers with the denoising runner, or with page summaries."""
