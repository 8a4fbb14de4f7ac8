"""Live view of canvases: reports of the engine's steps as frames of a stream, on a page and in a terminal
(docs/view.md)."""
