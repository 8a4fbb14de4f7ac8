"""One step of all requests as a batch of streams. Torch only, but for vLLM's FlashAttention on a GPU."""
