"""Marks prompts that clients wrote as text, to distinguish mask tokens in text from masks among token ids.

Read in vLLM 0.32 and 0.33: renderers/base.py. `_tokenize_prompt` tokenises text, including rendered chats. Afterwards
text and token ids are not distinguished. A prompt of token ids may have a text, too, which vLLM decodes from the ids
for `echo`.
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
