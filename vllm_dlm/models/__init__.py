"""The transformer of all families as row-wise layers on vLLM's parallel linear layers, and checks of checkpoints."""
