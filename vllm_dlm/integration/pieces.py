"""A server takes the log-probabilities of a step in pieces and serves other clients between them.

A step can fill a whole canvas, so a request may get at once what an autoregressive model gives in a thousand steps.
vLLM decodes every listed token by itself on the event loop: 1,000 tokens with 20 log-probabilities take a second.

Read in vLLM 0.32 and 0.33: v1/engine/core_client.py (`AsyncMPClient`), v1/engine/async_llm.py (`output_handler`),
v1/engine/logprobs.py (`_update_sample_logprobs`).
"""

import asyncio
from collections import deque
from collections.abc import Iterator

from msgspec.structs import replace
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

#: log-probabilities of a piece; vLLM takes up to 55 us for one
ENTRIES = 1024


def get_output_async(get):
    async def get_piece(self):
        if (waiting := getattr(self, "dlm_pieces", None)) is None:  # of another model, see envelope.py
            return await get(self)
        if waiting:
            await asyncio.sleep(0)
        else:
            waiting.extend(pieces(await get(self)))
        return waiting.popleft()

    return get_piece


def pieces(outputs: EngineCoreOutputs) -> deque[EngineCoreOutputs]:
    """The last one carries what concerns the step as a whole."""
    parts: list[list[EngineCoreOutput]] = [[]]
    entries = 0
    for output in (part for whole in outputs.outputs for part in split(whole)):
        if entries and entries + size(output) > ENTRIES:
            parts.append([])
            entries = 0
        parts[-1].append(output)
        entries += size(output)
    if len(parts) == 1:
        return deque([outputs])
    *others, last = parts
    step = {"engine_index": outputs.engine_index, "timestamp": outputs.timestamp}
    step["weight_version"] = outputs.weight_version
    found = deque(EngineCoreOutputs(outputs=own, **step) for own in others)
    found.append(replace(outputs, outputs=last))
    return found


def split(output: EngineCoreOutput) -> Iterator[EngineCoreOutput]:
    """The first part carries what comes with the prompt, the last one why the request ended."""
    if size(output) <= ENTRIES:
        yield output
        return
    tokens, logprobs = output.new_token_ids, output.new_logprobs
    most = max(ENTRIES // logprobs.logprobs.shape[1], 1)  # tokens
    for start in range(0, len(tokens), most):
        own = tokens[start : start + most]
        part = {"new_token_ids": own, "new_logprobs": logprobs.slice_request(start, len(own))}
        if start:
            part |= {"new_prompt_logprobs_tensors": None, "events": None, "prefill_stats": None}
        if start + most < len(tokens):
            part |= {"finish_reason": None, "stop_reason": None, "kv_transfer_params": None}
        yield replace(output, **part)


def size(output: EngineCoreOutput) -> int:
    """Its log-probabilities"""
    return 0 if output.new_logprobs is None else output.new_logprobs.logprobs.size
