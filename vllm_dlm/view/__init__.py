"""The live view: a page that shows canvases as they fill, and what the policies did for it in each step."""
