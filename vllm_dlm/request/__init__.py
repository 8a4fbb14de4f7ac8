"""Parses, tokenises and checks the options and texts of a request into one `CanvasRequest`.

This package imports neither vLLM nor torch. `integration` calls it for each request and sends the result to the engine.
"""
