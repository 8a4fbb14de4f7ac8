"""Seeing a canvas fill: from the engine's steps to frames of a stream, a page and a terminal; see docs/view.md."""
