"""What a request gives of its canvas, as tokens: the front-end has the tokenizer, and refuses what cannot be held."""

from vllm_dlm.given import Layout, Text
from vllm_dlm.integration.prompts import prompt_ids
from vllm_dlm.integration.refusal import refuse
from vllm_dlm.options import Options


def layout_of(options: Options, processor) -> tuple[Layout, list[int]]:
    """How the canvas is laid out, and the tokens behind it."""
    suffix = tokens_of("dlm_suffix", options.given.suffix, processor, options.infill)
    return Layout(suffix=len(suffix)), suffix


def tokens_of(field: str, given: Text, processor, infill: bool | None = None) -> list[int]:
    """Masks among them are holes as those of a prompt are."""
    if not isinstance(given, str):
        size = processor.model_config.get_vocab_size()
        for token in given:
            if not 0 <= token < size:
                refuse(field, token, f"token ids are those from 0 to {size - 1}")
        return prompt_ids(list(given), False, infill, processor)
    if not given:
        return []
    if processor.tokenizer is None:
        refuse(field, given, "this engine has no tokenizer, so give a list of token ids")
    return prompt_ids(processor.get_tokenizer().encode(given, add_special_tokens=False), True, infill, processor)
