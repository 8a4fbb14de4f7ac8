"""LLaDA and Dream as row-wise layers on vLLM's parallel linears."""
