"""Mask tokens of a prompt: holes to fill where the client wrote token ids or asked for it, else text.

A hole costs a step as a token of the response does, so what a user typed must
not make holes by itself. Read in vLLM 0.32 and 0.33: renderers/base.py, where text
(chats rendered by their template included) becomes token ids in
`_tokenize_prompt`, and both go on together; prompts given as ids may have a
text, too, made of the ids for `echo`.
"""

from vllm_dlm.integration.registration import is_diffusion_lm


class Written(str):
    """The text of a prompt that a client wrote, as against one decoded from the ids it wrote."""


def tokenize_prompt(tokenize):
    def tokenize_with_dlm(self, prompt, params):
        tokens = tokenize(self, prompt, params)
        if is_diffusion_lm(self.model_config):
            tokens["prompt"] = Written(tokens["prompt"])
        return tokens

    return tokenize_with_dlm


def is_text(prompt) -> bool:
    """Of what `process_inputs` gets: a rendered prompt, or one as `LLM.generate` takes them."""
    if isinstance(prompt, dict) and "type" in prompt:
        return isinstance(prompt.get("prompt"), Written)
    return isinstance(prompt, str) or (isinstance(prompt, dict) and "prompt_token_ids" not in prompt)


def prompt_ids(ids: list[int], text: bool, infill: bool | None, processor) -> list[int]:
    """The ids the model gets; a mask that is text is spelt out."""
    mask_id = processor.model_config.hf_config.mask_token_id
    holes = not text if infill is None else infill
    if holes or mask_id not in ids:
        return ids
    spelt = spelt_out(mask_id, processor)
    return [own for token in ids for own in (spelt if token == mask_id else (token,))]


def spelt_out(mask_id: int, processor) -> list[int]:
    """Ids that read as the mask token and are not it: the tokenizer sees its first character and the rest apart."""
    if not hasattr(processor, "dlm_spelt_mask"):
        tokenizer = processor.get_tokenizer()
        literal = tokenizer.decode([mask_id])
        parts = (tokenizer.encode(part, add_special_tokens=False) for part in (literal[:1], literal[1:]))
        spelt = [token for part in parts for token in part]
        processor.dlm_spelt_mask = [token for token in spelt if token != mask_id]
    return processor.dlm_spelt_mask
