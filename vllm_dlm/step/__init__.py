"""One step of all requests as a batch of streams. Requires only torch, and vLLM's FlashAttention on a GPU."""
