"""The scheduler of denoising steps and its managers."""
