"""Texts or token ids of a request for scores become pairs of token ids, or the request is refused by name."""

from collections.abc import Callable
from typing import Any

from vllm_dlm.integration.prompts import prompt_ids
from vllm_dlm.integration.requests import refuse, server_options_of
from vllm_dlm.scoring.scores import Pair

Text = str | list[int]

#: what contexts and continuations may be
WANTED = "a text, a list of token ids, or a list of either"


def pairs_of(context: Any, continuation: Any, add_special_tokens: bool, processor) -> list[Pair]:
    """One context goes with each of several continuations, and the other way round."""
    contexts, continuations = listed("context", context), listed("continuation", continuation)
    number = max(len(contexts), len(continuations))
    for name, own in (("context", contexts), ("continuation", continuations)):
        if len(own) not in (1, number):
            other = "continuation" if name == "context" else "context"
            refuse(name, f"{len(own)} of them", f"there must be one, or as many as of {other}, {number}")

    def encode(text: str) -> list[int]:
        ids = processor.get_tokenizer().encode(text, add_special_tokens=add_special_tokens)
        return prompt_ids(ids, True, None, processor)

    def at(own: list[Text], index: int) -> Text:
        return own[index if len(own) > 1 else 0]

    pairs = [paired(at(contexts, index), at(continuations, index), encode) for index in range(number)]
    for pair in pairs:
        check(pair, processor)
    return pairs


def listed(field: str, given: Any) -> list[Text]:
    if isinstance(given, str) or is_ids(given):
        return [given]
    if isinstance(given, list) and given and all(isinstance(each, str) or is_ids(each) for each in given):
        return given
    refuse(field, given, f"it must be {WANTED}, none of them empty")


def is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(each) is int for each in given)


def paired(context: Text, continuation: Text, encode: Callable[[str], list[int]]) -> Pair:
    """Two texts are encoded as one, and what the context alone does not take up is the continuation, as evaluations
    of language models have it."""
    if isinstance(continuation, list):
        return Pair(encode(context) if isinstance(context, str) else context, continuation)
    if isinstance(context, list):
        refuse("continuation", continuation, "it must be token ids where the context is")
    before = encode(context)
    return Pair(before, encode(context + continuation)[len(before) :])


def check(pair: Pair, processor) -> None:
    model, options = processor.model_config, server_options_of(processor)
    mask_id, vocabulary, longest = model.hf_config.mask_token_id, model.get_vocab_size(), options.canvas.max
    for field, ids in (("context", pair.context), ("continuation", pair.continuation)):
        if not ids:
            refuse(field, ids, "it must have at least one token")
        for token in ids:
            if not 0 <= token < vocabulary or token == mask_id:
                refuse(field, token, f"it must be a token from 0 to {vocabulary - 1} that is not the mask, {mask_id}")
    number, answer = len(pair.context), len(pair.continuation)
    if longest is not None and answer > longest:
        refuse("continuation", f"{answer} tokens", f"the longest canvas of this server has {longest}")
    if number + answer > options.canvas_length(number, answer, model.max_model_len):
        both, room = f"{number} and {answer} tokens", model.max_model_len
        refuse("context and continuation", both, f"they must fit into the model's length of {room} tokens")
