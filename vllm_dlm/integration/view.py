"""From engine to clients: frames are taken out of the engine's outputs, and streams and responses carry them.

Requests without `dlm_frames`, `dlm_watch` or `dlm_trajectory` pass through untouched. Read in vLLM 0.32 and 0.33:
v1/engine/output_processor.py (`process_outputs`), v1/engine/async_llm.py
(`generate`), and entrypoints/openai/{completion,chat_completion}/serving.py
(each returns a generator of the lines of a stream, or a response).
"""

from collections import Counter
from contextlib import aclosing

from vllm.sampling_params import RequestOutputKind

from vllm_dlm.integration import requests
from vllm_dlm.integration.registration import is_diffusion_lm
from vllm_dlm.integration.requests import options_of, refuse
from vllm_dlm.options import Options
from vllm_dlm.view.frames import KEY
from vllm_dlm.view.hub import HUB, Request, texts_of
from vllm_dlm.view.streams import CHANNEL, Channel, with_frames, with_trajectories

#: in a request's options: it tells of its steps
TELLING = {"dlm_frames", "dlm_watch", "dlm_trajectory"}
#: in additional_config, as `--dlm-view` leaves it
VIEW = "dlm_view"


def tells(extra_args) -> bool:
    return bool(extra_args) and not TELLING.isdisjoint(extra_args)


# -- an engine's outputs -------------------------------------------------------------------------


def process_outputs(process):
    def process_without_messages(self, engine_core_outputs, *args, **kwargs):
        if not any(output.kv_transfer_params for output in engine_core_outputs):
            return process(self, engine_core_outputs, *args, **kwargs)
        states, theirs = {}, []
        for output in engine_core_outputs:
            message = (output.kv_transfer_params or {}).get(KEY)
            if message is None:
                theirs.append(output)
                continue
            if (state := self.request_states.get(output.request_id)) is not None:
                states[output.request_id] = state
                take(self, state, message)
            if "filled" in message:  # beside tokens
                output.kv_transfer_params = None
                theirs.append(output)
        done = process(self, theirs, *args, **kwargs)
        kept = {keeper(state).external_req_id: keeper(state) for state in states.values()}
        for output in done.request_outputs:  # of `LLM`; those of servers have gone to `generate`
            for completion in output.outputs if output.request_id in kept else ():
                filled = vars(kept[output.request_id]).get("dlm_filled", {}).get(completion.index)
                if completion.finish_reason is not None and filled is not None:
                    completion.dlm = {"trajectory": filled[: len(completion.token_ids)]}
        return done

    return process_without_messages


def keeper(state):
    """What lives as long as all choices of a request."""
    return state.parent_req or state


def take(processor, state, message: dict) -> None:
    if state.queue is None and "filled" in message:
        filled = vars(keeper(state)).setdefault("dlm_filled", {})
        filled.setdefault(state.request_index, []).extend(message["filled"])
    else:
        HUB.take(keeper(state).external_req_id, state.request_index, message, texts_of(processor.tokenizer))


# -- requests ------------------------------------------------------------------------------------


def process_inputs(process):
    checked = requests.process_inputs(process)

    def process_followed(self, request_id, prompt, params, *args, **kwargs):
        request = checked(self, request_id, prompt, params, *args, **kwargs)
        if tells(getattr(params, "extra_args", None)) and is_diffusion_lm(self.model_config):
            if (telling := HUB.requests.get(request_id)) is None:
                refuse_unseen(options_of(params, self), self, None)
            else:
                telling.prompt = request.prompt_token_ids
        return request

    return process_followed


def refuse_unseen(options: Options, processor, channel: Channel | None) -> None:
    if options.frames and (channel is None or not channel.stream):
        refuse("dlm_frames", 1, "frames come with a streamed chat or completion of a server")
    if options.watch and not (processor.vllm_config.additional_config or {}).get(VIEW):
        refuse("dlm_watch", 1, "nobody could watch, the server has to be started with --dlm-view")


def generate(generate_theirs):
    checked = requests.generate(generate_theirs)

    def generate_and_tell(self, prompt, sampling_params, request_id, *args, **kwargs):
        theirs = checked(self, prompt, sampling_params, request_id, *args, **kwargs)
        if not tells(sampling_params.extra_args) or not is_diffusion_lm(self.model_config):
            return theirs
        options, channel = options_of(sampling_params, self.input_processor), CHANNEL.get()
        refuse_unseen(options, self.input_processor, channel)
        if not (options.observed or options.trajectory):
            return theirs
        if request_id in HUB.requests:
            refuse("request_id", request_id, "another request of this name is being looked at")
        served, choices = self.model_config.served_model_name, sampling_params.n
        model = served if isinstance(served, str) else served[0]
        first = 0 if channel is None else channel.opened(choices)
        own = channel.follower if channel and options.frames else None
        request = Request(request_id, model, choices, options.watch, own, first)
        return followed(theirs, request, sampling_params.output_kind, channel if options.trajectory else None, options)

    return generate_and_tell


async def followed(theirs, request: Request, kind, channel: Channel | None, options: Options):
    """Their outputs; meanwhile the request is known to those who follow."""
    HUB.add(request)
    tokens: Counter[int] = Counter()
    try:
        async with aclosing(theirs):
            async for output in theirs:
                ended = []
                for completion in output.outputs:
                    canvas, count = request.canvases[completion.index], len(completion.token_ids)
                    tokens[completion.index] = count + tokens[completion.index] * (kind == RequestOutputKind.DELTA)
                    if completion.finish_reason is None:
                        continue
                    ended.append((canvas, completion.finish_reason, tokens[completion.index]))
                    if options.trajectory:
                        completion.dlm = {"trajectory": canvas.filled[: tokens[completion.index]]}
                        if channel is not None:
                            channel.trajectories[canvas.choice] = completion.dlm["trajectory"]
                yield output
                for canvas, reason, count in ended:
                    canvas.end(reason, count)
    finally:
        HUB.remove(request)


# -- responses -----------------------------------------------------------------------------------


def create_completion(create):
    return _create(create, "text_completion", {"text": ""})


def create_chat_completion(create):
    return _create(create, "chat.completion.chunk", {"delta": {}})


def _create(create, kind: str, empty: dict):
    async def create_and_tell(self, request, raw_request=None):
        if not tells(request.vllm_xargs) or not is_diffusion_lm(self.model_config):
            return await create(self, request, raw_request)
        channel = Channel(bool(request.stream), kind, empty, self.models.model_name())
        token = CHANNEL.set(channel)
        try:
            response = await create(self, request, raw_request)
        finally:
            CHANNEL.reset(token)
        channel.name = getattr(getattr(raw_request.state, "request_metadata", None), "request_id", None)
        if not channel.choices:
            return response
        return with_frames(response, channel) if channel.stream else with_trajectories(response, channel)

    return create_and_tell
