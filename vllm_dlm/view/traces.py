"""Reports of observed requests from the scheduler: frames of their canvases, and the step that filled each token.

Both are sent in envelopes (envelope.py), in separate outputs before vLLM's outputs of the same step. Frames contain
token ids; the front-end adds their text.

Changes are found by comparing the canvas with its state after the previous step. This covers all causes: filled,
revoked and edited tokens, speculation, and preemption.
"""

import math
import time
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.envelope import Envelope, EnvelopeOutput, envelope_output
from vllm_dlm.view.frames import INTERVAL, Frame, Guesses, History
from vllm_dlm.view.isolation import Isolated, isolated
from vllm_dlm.view.seen import StepRecord


class Trace(Isolated):
    """Reports of one running request."""

    def __init__(self, request_id: str, client_index: int):
        self.request_id, self.client_index = request_id, client_index
        self.error_is_due = False

    @property
    def subject(self) -> str:
        return f"request {self.request_id}"

    def fail(self, error: Exception) -> None:
        super().fail(error)
        self.error_is_due = True

    @isolated
    def begins(self, canvas: Canvas, layers: int, stop: bool) -> None:
        """`stop`: the request has stop strings, which only the front-end can check"""
        self.layers, self.stop = layers, stop
        self.options, self.prompt_len, self.mask_id = canvas.options, canvas.prompt_len, canvas.mask_id
        self.tokens = canvas.tokens.copy()  # after the previous step
        self.steps = np.zeros(len(canvas), np.int64)  # step that filled each position; 0: none
        self.delivered = 0
        if not self.options.observed:
            return
        self.history = History(self.tokens != self.mask_id)
        self.told = self.history.now()
        self.begin: dict | None = self._begin(canvas)
        self.sent = -math.inf

    def _begin(self, canvas: Canvas) -> dict[str, Any]:
        options, prompt = self.options, self.prompt_len
        filled = np.flatnonzero(self.tokens != self.mask_id)
        return {
            "length": len(canvas),
            "holes": np.flatnonzero(self.tokens[:prompt] == self.mask_id).tolist(),
            "canvas": len(canvas) - prompt,
            "block_length": max(end - start for start, end in canvas.blocks),
            "reuse": options.reuse.name or "none",
            "selection": options.selection.name,
            "decoding": options.decoding.name,
            "extent": options.extent.name,
            "layers": self.layers,
            "page_size": options.selection.unit if options.selection.sparse else None,
            "given": [[at - prompt, int(self.tokens[at])] for at in filled.tolist() if at >= prompt],
        }

    # -- a step ----------------------------------------------------------------------------

    @isolated
    def stepped(self, canvas: Canvas, commit: Commit, seen: StepRecord | None, requests: int) -> None:
        """Called after the canvas has applied the commit."""
        if seen is not None and seen.fault is not None:  # logged by the worker
            self.fault, self.error_is_due = seen.fault, True
            return
        changed = np.flatnonzero(canvas.tokens != self.tokens)
        if self.options.observed:
            self.history.add(self._frame(canvas, changed, commit, seen or StepRecord(), requests))
        self.tokens[changed] = now = canvas.tokens[changed]
        self.steps[changed] = np.where(now == self.mask_id, 0, canvas.step)

    def _frame(self, canvas: Canvas, changed: np.ndarray, commit: Commit, seen: StepRecord, requests: int) -> Frame:
        dense = canvas.streams * len(seen.rows) * self.layers
        now = canvas.tokens[changed]
        return Frame(
            canvas.step,
            requests,
            canvas.block + 1,
            changed,
            self.tokens[changed] != self.mask_id,
            now != self.mask_id,
            now,
            canvas.confidence[changed],
            np.full(len(changed), canvas.step),
            np.array([1, seen.ms, seen.live, seen.recomputed, dense, seen.keys_read, seen.keys_there], float),
            self._shares(canvas, seen),
            self._guesses(canvas, commit, seen),
        )

    def _guesses(self, canvas: Canvas, commit: Commit, seen: StepRecord) -> Guesses:
        known = len(seen.tokens) == len(commit.read)
        left = np.flatnonzero((canvas.tokens[commit.read] == self.mask_id) & known)
        best = None if seen.best is None else seen.best[:, :, left]
        return Guesses.build(commit.read[left], seen.tokens[left] if known else left, commit.confidence[left], best)

    def _shares(self, canvas: Canvas, seen: StepRecord) -> np.ndarray:
        """[2, N] share of layers that recomputed a row, and that read a key"""
        shares, rows = np.zeros((2, len(canvas))), len(seen.rows)
        if rows:
            # the last row may represent a later position
            shares[0, : rows - 1], shares[0, canvas.last] = seen.rows[:-1], seen.rows[-1]
        if seen.pages is not None:
            shares[1, :rows] = np.repeat(seen.pages, seen.unit)[:rows]
        return shares

    # -- to the front-end ------------------------------------------------------------------

    @isolated
    def report(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Adds due reports to a step's outputs. Frames come before vLLM's output, with which a request may end."""
        own = self.own(outputs)
        tokens, finished = sum(len(one.new_token_ids) for one in own), any(one.finished for one in own)
        found = self._due(finished or (tokens > 0 and self.stop)) if self.options.observed else []
        if self.options.trajectory:
            found += [Envelope(filled=self._deliver(len(one.new_token_ids))) for one in own]
        add_first(outputs, self, found)

    def own(self, outputs: dict[int, EngineCoreOutputs]) -> list[EngineCoreOutput]:
        """vLLM's outputs of the request"""
        client = outputs.get(self.client_index)
        theirs = [one for one in client.outputs if not isinstance(one, EnvelopeOutput)] if client else []
        return [one for one in theirs if one.request_id == self.request_id]

    def _due(self, at_once: bool) -> list[Envelope]:
        now = time.monotonic()
        if self.history.count == self.told.number or (now - self.sent < INTERVAL and not at_once):
            return []
        frame = self.history.since(self.told).pack()
        found = [{"frame": frame}] if self.begin is None else [{"begin": self.begin}, {"frame": frame}]
        self.sent, self.begin, self.told = now, None, self.history.now()
        return [Envelope(view=msgspec.msgpack.encode(message)) for message in found]

    def _deliver(self, tokens: int) -> list[int]:
        """The steps that filled the next tokens"""
        start = self.prompt_len + self.delivered
        self.delivered += tokens
        return self.steps[start : start + tokens].tolist()


def add_first(outputs: dict[int, EngineCoreOutputs], trace: Trace, envelopes: list[Envelope]) -> None:
    if envelopes:
        client = outputs.setdefault(trace.client_index, EngineCoreOutputs())
        client.outputs = [envelope_output(trace.request_id, each) for each in envelopes] + client.outputs


def report(traces: Iterable[Trace], outputs: dict[int, EngineCoreOutputs]) -> None:
    for trace in traces:
        trace.report(outputs)
        if trace.fault is None:
            continue
        found = [Envelope(fault=trace.fault) for _ in trace.own(outputs)]  # instead of the steps of each token
        if trace.error_is_due:
            trace.error_is_due = False
            found.insert(0, Envelope(view=msgspec.msgpack.encode({"error": trace.fault})))
        add_first(outputs, trace, found)
