"""A table of hostile requests, and a run that sends it to a server next to clients with known answers.

- `rows.py`: what a row is, and the whole table. `options.py`, `given.py`, `fields.py` and `scores.py` make the rows,
  from the registered methods, the request fields and the limits wherever possible.
- `acts.py`: how a row is sent: asked, left, not read, watched.
- `hooks.py`, `health.py`: what is measured in the server's processes, and from outside.
- `run.py`, `table.py`: the run and its report. `races.py`: two requests with one X-Request-Id.
"""
