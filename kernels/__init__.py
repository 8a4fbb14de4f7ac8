"""One folder per operation: naive.py (the truth, plain torch), a fast path per device, and the choice between them."""
