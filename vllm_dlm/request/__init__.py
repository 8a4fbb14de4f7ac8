"""What a client may ask of a canvas, from its options and texts to one checked `CanvasRequest`.

Nothing here imports vLLM or torch. `integration` calls it for each request and carries the result to the engine.
"""
