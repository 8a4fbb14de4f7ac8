"""The transformer of every family as row-wise layers on vLLM's parallel linears, and the checks of its files."""
