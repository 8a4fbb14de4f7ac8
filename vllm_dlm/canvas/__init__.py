"""The canvas of a request, the commit loop, and one module per feature. Independent of vLLM."""
