"""What the scheduler tells of requests that somebody looks at: frames of their canvases, and which step filled what.

Both travel in `kv_transfer_params` of vLLM's EngineCoreOutput, a dictionary that these models have no other use for:
frames in outputs of their own, which integration/view.py takes out before vLLM sees them, and the steps of delivered
tokens beside the tokens. Frames carry token ids; whoever has a tokenizer makes text of them.

What changed is found by comparing the canvas with what was told of it, so it does not matter who changed it: a
decoding that fills, revokes or edits, a draft, or a preemption.
"""

import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from vllm_dlm.engine.canvas import Canvas, Commit
from vllm_dlm.view.frames import INTERVAL, KEY, Frame, merged, runs
from vllm_dlm.view.steps import SeenStep


class Trace:
    """Of one request, as long as it runs."""

    def __init__(self, canvas: Canvas, request_id: str, client_index: int, layers: int, stop: bool):
        """`stop`: its text may end the request, which only the front-end sees"""
        self.request_id, self.client_index, self.layers, self.stop = request_id, client_index, layers, stop
        self.options, self.prompt_len = canvas.options, canvas.prompt_len
        self.mask_id = canvas.mask_id
        self.tokens = canvas.tokens.copy()  # as it was told
        self.steps = np.zeros(len(canvas), np.int64)  # that filled each position; 0: none
        self.delivered = 0
        self.pending: Frame | None = None
        self.begin: dict | None = self._begin(canvas)
        self.sent = -math.inf

    def _begin(self, canvas: Canvas) -> dict[str, Any]:
        options, prompt = self.options, self.prompt_len
        filled = prompt + np.flatnonzero(self.tokens[prompt:] != self.mask_id)
        return {
            "canvas": len(canvas) - prompt,
            "block_length": max(end - start for start, end in canvas.blocks),
            "reuse": options.reuse.name or "none",
            "selection": options.selection.name,
            "decoding": options.decoding.name,
            "extent": options.extent.name,
            "layers": self.layers,
            "page_size": options.selection.unit if options.selection.sparse else None,
            "given": np.stack([filled - prompt, self.tokens[filled]], 1).tolist(),
        }

    # -- a step ----------------------------------------------------------------------------

    def stepped(self, canvas: Canvas, commit: Commit, seen: SeenStep | None, requests: int) -> None:
        """The canvas has applied the commit."""
        now = canvas.tokens
        changed = np.flatnonzero(now != self.tokens)
        if seen is not None:
            frame = self._frame(canvas, changed, commit, seen, requests)
            self.pending = frame if self.pending is None else merged(self.pending, frame)
        self.steps[changed] = np.where(now[changed] == self.mask_id, 0, canvas.step)
        self.tokens[changed] = now[changed]

    def _frame(self, canvas: Canvas, changed: np.ndarray, commit: Commit, seen: SeenStep, requests: int) -> Frame:
        step, start = canvas.step, self.prompt_len
        was, now = self.tokens[changed] != self.mask_id, canvas.tokens[changed] != self.mask_id

        def entries(which: np.ndarray) -> list[list]:
            at = changed[which]
            columns = (at - start).tolist(), canvas.tokens[at].tolist(), map(number, canvas.confidence[at].tolist())
            return [[*entry, step] for entry in zip(*columns, strict=True)]

        return {
            "step": step,
            "steps": 1,
            "ms": round(seen.ms, 3),
            "requests": requests,
            "block": canvas.block + 1,
            "set": entries(~was & now),
            "unset": [[at, step] for at in (changed[was & ~now] - start).tolist()],
            "edited": entries(was & now),
            "guesses": self._guesses(canvas, commit, seen),
            "rows": {
                "live": seen.live,
                "recomputed": seen.recomputed,
                "dense": canvas.streams * len(seen.rows) * self.layers,
            },
            "keys": {"read": seen.keys_read, "of": seen.keys_there},
            "heat": {"rows": self._heat(canvas, seen.rows), "pages": self._pages(seen)},
        }

    def _guesses(self, canvas: Canvas, commit: Commit, seen: SeenStep) -> list[list]:
        left = np.flatnonzero(canvas.tokens[commit.read] == self.mask_id)
        if len(seen.tokens) != len(commit.read):
            return []
        guesses = []
        for index in left.tolist():
            token, others = int(seen.tokens[index]), []
            if seen.best is not None:
                pairs = zip(*seen.best[:, :, index].tolist(), strict=True)
                others = [[int(other), number(p)] for other, p in pairs if int(other) != token and p > 0][:3]
            position = int(commit.read[index]) - self.prompt_len
            guesses.append([position, token, number(commit.confidence[index]), others])
        return guesses

    def _heat(self, canvas: Canvas, rows: np.ndarray) -> list[list]:
        """The last row may stand for a later position."""
        if canvas.last == len(rows) - 1:
            return runs(rows, -self.prompt_len)
        return runs(rows[:-1], -self.prompt_len) + runs(rows[-1:], canvas.last - self.prompt_len)

    def _pages(self, seen: SeenStep) -> list[list]:
        if seen.pages is None:
            return []
        return runs(np.repeat(seen.pages, seen.unit)[: len(seen.rows)], -self.prompt_len)

    # -- on the way to the front-end -------------------------------------------------------

    def messages(self, tokens: int, finished: bool) -> list[dict]:
        """What is due: everything, if this step's output says so."""
        if self.pending is None:
            return []
        now = time.monotonic()
        if now - self.sent < INTERVAL and not finished and not (tokens and self.stop):
            return []
        self.sent, found = now, []
        if self.begin is not None:
            found.append({"begin": self.begin})
        found.append({"frame": self.pending})
        self.begin = self.pending = None
        return found

    def deliver(self, tokens: int) -> list[int]:
        """The steps of the tokens that come next"""
        start = self.prompt_len + self.delivered
        self.delivered += tokens
        return self.steps[start : start + tokens].tolist()


def number(value: float) -> float | None:
    """As JSON can say it"""
    return round(float(value), 4) if math.isfinite(value) else None


def report(traces: Iterable[Trace], outputs: dict[int, EngineCoreOutputs]) -> None:
    """Adds to a step's outputs what these requests have to tell. Frames come first: a request may end with its
    output."""
    for trace in traces:
        client = outputs.get(trace.client_index)
        own = [one for one in client.outputs if one.request_id == trace.request_id] if client else []
        tokens = sum(len(one.new_token_ids) for one in own)
        if trace.options.trajectory:
            for one in own:
                one.kv_transfer_params = {KEY: {"filled": trace.deliver(len(one.new_token_ids))}}
        found = trace.messages(tokens, any(one.finished for one in own))
        if found:
            if client is None:
                client = outputs[trace.client_index] = EngineCoreOutputs()
            frames = [EngineCoreOutput(trace.request_id, [], kv_transfer_params={KEY: each}) for each in found]
            client.outputs = frames + client.outputs
