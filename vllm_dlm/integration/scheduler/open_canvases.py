"""Canvases of an engine's requests, from the first scheduling attempt to the end of a request."""

from collections.abc import Mapping

from vllm.v1.request import Request

from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.configuration import server_options_of
from vllm_dlm.integration.outputs import CanvasData
from vllm_dlm.request.canvas_request import CANVAS_REQUEST, CanvasRequest
from vllm_dlm.view.seen import StepRecord
from vllm_dlm.view.traces import Trace


class OpenCanvases(dict[str, Canvas]):
    """request id -> canvas. Canvases with reported steps have a trace."""

    def __init__(self, vllm_config):
        super().__init__()
        self.model_config = vllm_config.model_config
        self.traces: dict[str, Trace] = {}

    def open(self, request: Request) -> Canvas:
        """The canvas of a request, created by the first call"""
        if canvas := self.get(request.request_id):
            return canvas
        params, config = request.sampling_params, self.model_config.hf_config
        server, wire = server_options_of(self.model_config), params.extra_args[CANVAS_REQUEST]
        asked = CanvasRequest.from_wire(wire, server, request.prompt_token_ids, request.max_tokens)
        mask_id, shift = config.mask_token_id, config.logits_shift
        canvas = Canvas(asked.options, mask_id, shift, asked.prompt_ids, asked.length, asked.layout)
        self[request.request_id] = canvas
        if asked.options.observed or asked.options.trajectory:
            trace = self.traces[request.request_id] = Trace(request.request_id, request.client_index)
            trace.begins(canvas, config.num_hidden_layers, bool(params.stop))
        return canvas

    def starting(self, request: Request, block_ids: tuple[list[int], ...]) -> CanvasData:
        """Data for the worker about a request that starts"""
        data = CanvasData.from_request(request, block_ids)
        data.canvas = self[request.request_id]
        return data

    def close(self, request_id: str) -> None:
        self.pop(request_id, None)
        self.traces.pop(request_id, None)

    def traced(self, commits: Mapping[str, Commit], seen: Mapping[str, StepRecord]) -> list[Trace]:
        """Updates and returns the traces of requests in this step. Called before requests can end; their reports follow
        later."""
        found = [(name, trace) for name, trace in self.traces.items() if name in commits and name in self]
        for name, trace in found:
            trace.stepped(self[name], commits[name], seen.get(name), len(commits))
        return [trace for _, trace in found]
