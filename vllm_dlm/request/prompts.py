"""Mask tokens of a prompt: positions to fill if the client sent token ids or requested infilling, otherwise text.

A mask to fill costs as much as a position of the response, so user text must not contain one by accident.
"""

from typing import Any


class WrittenText(str):
    """A prompt that the client wrote as text, in contrast to text that vLLM decoded from the client's token ids."""


def is_text(prompt: Any) -> bool:
    """Whether the client wrote the prompt as text. `prompt`: rendered by vLLM, or an input of `LLM.generate`"""
    if isinstance(prompt, dict) and "type" in prompt:
        return isinstance(prompt.get("prompt"), WrittenText)
    return isinstance(prompt, str) or (isinstance(prompt, dict) and "prompt_token_ids" not in prompt)


def prompt_ids(ids: list[int], text: bool, infill: bool | None, processor: Any) -> list[int]:
    """The token ids that the model reads. Masks that are text are replaced by ids that spell the mask token."""
    mask_id = processor.model_config.hf_config.mask_token_id
    fill = not text if infill is None else infill
    if fill or mask_id not in ids:
        return ids
    spelt = spelt_mask(mask_id, processor)
    return [own for token in ids for own in (spelt if token == mask_id else (token,))]


def spelt_mask(mask_id: int, processor: Any) -> list[int]:
    """Ids that spell the mask token as text: its first character and the rest, tokenised separately."""
    if not hasattr(processor, "dlm_spelt_mask"):
        tokenizer = processor.get_tokenizer()
        literal = tokenizer.decode([mask_id])
        parts = (tokenizer.encode(part, add_special_tokens=False) for part in (literal[:1], literal[1:]))
        spelt = [token for part in parts for token in part]
        processor.dlm_spelt_mask = [token for token in spelt if token != mask_id]
    return processor.dlm_spelt_mask
