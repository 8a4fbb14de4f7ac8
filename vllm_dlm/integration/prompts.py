"""Marks prompts that clients wrote as text, so that mask tokens in them can be told from masks among token ids.

Read in vLLM 0.32 and 0.33: renderers/base.py. `_tokenize_prompt` turns text, including chats rendered by their
template, into token ids; afterwards both are treated alike. A prompt given as ids may have a text, too, which vLLM
decodes from the ids for `echo`.
"""

from vllm_dlm.configuration import is_diffusion_lm
from vllm_dlm.request.prompts import WrittenText


def tokenize_prompt(tokenize):
    def tokenize_with_dlm(self, prompt, params):
        tokens = tokenize(self, prompt, params)
        if is_diffusion_lm(self.model_config):
            tokens["prompt"] = WrittenText(tokens["prompt"])
        return tokens

    return tokenize_with_dlm
