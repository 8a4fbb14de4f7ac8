"""Passes the live view's messages from the engine to clients, as frames in streams and trajectories in responses.

Requests without `dlm_frames`, `dlm_watch` or `dlm_trajectory` are not changed. Errors of the view are caught at its
entry points (view/isolation.py). Read in vLLM 0.32 and 0.33: v1/engine/output_processor.py
(`process_outputs`), v1/engine/input_processor.py (`assign_request_id`), v1/engine/parallel_sampling.py,
v1/engine/async_llm.py (`generate`), and entrypoints/openai/{completion,chat_completion}/serving.py
(each returns a generator of the lines of a stream, or a response).
"""

from contextlib import aclosing
from contextvars import ContextVar
from weakref import finalize

import msgspec
from vllm.sampling_params import RequestOutputKind

from vllm_dlm.configuration import is_diffusion_lm
from vllm_dlm.envelope import Envelope, envelope_in
from vllm_dlm.options import Options
from vllm_dlm.refusal import refuse
from vllm_dlm.view.hub import HUB
from vllm_dlm.view.isolation import Isolated, error_message, isolated
from vllm_dlm.view.observed import ObservedRequest
from vllm_dlm.view.streams import CHANNEL, Channel, with_frames

FRAMES_NEED = "frames require a streamed chat or completion of a server"
WATCH_NEEDS = "watching requires a server that was started with --dlm-view"
#: options with which the engine reports the steps of a request
OBSERVED = {"dlm_frames", "dlm_watch", "dlm_trajectory"}
#: key of additional_config that `--dlm-view` sets
VIEW = "dlm_view"
#: the observed request that gets vLLM's internal id next, in a list that is emptied then, because contexts persist
ADDED: ContextVar[list | None] = ContextVar("ADDED", default=None)


def observed(extra_args) -> bool:
    return bool(extra_args) and not OBSERVED.isdisjoint(extra_args)


# -- an engine's outputs -------------------------------------------------------------------------


class Trajectories(Isolated):
    """Steps that filled the tokens of a request of `LLM`, kept as long as vLLM keeps the request's state."""

    def __init__(self, name: str, prompt: list[int]):
        self.name, self.prompt = name, prompt
        self.filled: dict[int, list[int]] = {}  # choice -> step of each token

    @property
    def subject(self) -> str:
        return f"request {self.name}"

    @isolated
    def take(self, index: int, message: bytes, tokenizer) -> None:
        """Takes the engine's error message; without a server there are no frames."""
        self.fault = msgspec.msgpack.decode(message)["error"]

    @isolated
    def fill(self, index: int, steps: list[int], fault: str | None = None) -> None:
        """`steps`: steps that filled the next tokens of a choice; `fault`: why they are not available"""
        self.fault = fault
        self.filled.setdefault(index, []).extend(steps)

    @isolated
    def found(self, completion) -> dict:
        return {"trajectory": self.filled[completion.index][: len(completion.token_ids)]}

    def deliver(self, output) -> None:
        for completion in output.outputs:
            if completion.finish_reason is not None and (self.fault or completion.index in self.filled):
                completion.dlm = self.found(completion) or error_message(str(self.fault))


def process_outputs(process):
    def process_without_messages(self, engine_core_outputs, *args, **kwargs):
        if not any(map(envelope_in, engine_core_outputs)):
            return process(self, engine_core_outputs, *args, **kwargs)
        theirs, offline = [], dict[int, Trajectories]()
        for output in engine_core_outputs:
            if (envelope := envelope_in(output)) is None:
                theirs.append(output)
            elif (state := self.request_states.get(output.request_id)) is not None:
                deliver(envelope, state, offline, self.tokenizer)
        done = process(self, theirs, *args, **kwargs)
        for output in (
            done.request_outputs if offline else ()
        ):  # outputs of `LLM`; outputs of servers are passed to `generate`
            # Each request has its own list, while its external id may not be unique.
            if (found := offline.get(id(output.prompt_token_ids))) is not None:
                found.deliver(output)
        return done

    return process_without_messages


def deliver(envelope: Envelope, state, offline: dict[int, Trajectories], tokenizer) -> None:
    """Passes a message about a request to its receiver. `offline`: receivers for requests of `LLM`"""
    receiver: ObservedRequest | Trajectories | None = HUB.requests.get(keeper(state).request_id)
    if state.queue is None and (envelope.view is None or receiver is None):
        receiver = offline[id(state.prompt_token_ids)] = trajectories_of(state)
    if receiver is None:
        return
    if envelope.view is not None:
        receiver.take(state.request_index, envelope.view, tokenizer)
    else:
        receiver.fill(state.request_index, envelope.filled or [], envelope.fault)


def keeper(state):
    """The object with the lifetime of all choices of a request"""
    return state.parent_req or state


def trajectories_of(state) -> Trajectories:
    kept = vars(keeper(state))
    return kept.setdefault("dlm", Trajectories(keeper(state).request_id, state.prompt_token_ids))


# -- requests ------------------------------------------------------------------------------------


def assign_request_id(assign):
    def assign_and_bind(request):
        assign(request)
        if added := ADDED.get():
            added.pop().bind(request.request_id, request.prompt_token_ids)

    return assign_and_bind


def refuse_unseen(options: Options, processor, channel: Channel | None) -> None:
    if options.frames and (channel is None or not channel.stream):
        refuse("dlm_frames", 1, FRAMES_NEED)
    if options.watch and not (processor.vllm_config.additional_config or {}).get(VIEW):
        refuse("dlm_watch", 1, WATCH_NEEDS)


def observe(engine, outputs, params, request_id: str, options: Options):
    """Outputs of a checked request. An observed request is in the hub while its outputs are read."""
    if not (options.observed or options.trajectory):
        return outputs
    channel = CHANNEL.get()
    refuse_unseen(options, engine.input_processor, channel)
    served = engine.model_config.served_model_name
    model = served if isinstance(served, str) else served[0]
    request = ObservedRequest(request_id, model, params.n, options, channel)
    HUB.admit(request, options.limits, running(engine.output_processor))
    followed_outputs = followed(outputs, request, params.output_kind == RequestOutputKind.DELTA)
    finalize(followed_outputs, HUB.remove, [request]).atexit = False  # even if nothing iterates it
    return followed_outputs


def running(processor):
    return lambda name: name in processor.request_states or name in processor.parent_requests


async def followed(theirs, request: ObservedRequest, deltas: bool):
    """Yields vLLM's outputs of a request, which is in the hub meanwhile."""
    try:
        async with aclosing(theirs):
            token = ADDED.set([request])
            try:
                output = await anext(theirs, None)  # adds the request to the engine
            finally:
                ADDED.reset(token)
            while output is not None:
                request.note(output, deltas)
                yield output
                request.end_choices()
                output = await anext(theirs, None)
    finally:
        HUB.remove([request])


# -- responses -----------------------------------------------------------------------------------


def create_completion(create):
    return _create(create, "text_completion", {"text": ""})


def create_chat_completion(create):
    return _create(create, "chat.completion.chunk", {"delta": {}})


def _create(create, kind: str, empty: dict):
    async def create_observed(self, request, raw_request=None):
        if not observed(request.vllm_xargs) or not is_diffusion_lm(self.model_config):
            return await create(self, request, raw_request)
        channel = Channel(bool(request.stream), kind, empty, self.models.model_name())
        token = CHANNEL.set(channel)
        try:
            response = await create(self, request, raw_request)
        finally:
            CHANNEL.reset(token)
        if not channel.choices:
            return response
        if not channel.stream:
            return channel.with_trajectories(response)
        metadata = getattr(getattr(raw_request, "state", None), "request_metadata", None)
        channel.name = getattr(metadata, "request_id", None)
        return with_frames(response, channel)

    return create_observed
