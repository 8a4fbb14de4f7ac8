"""Default length of responses. vLLM's default is the model's length minus the prompt.

For a canvas that is the most expensive length, and often a wrong one. The server's default is therefore added to the
model's default sampling parameters, which every front-end (`LLM.chat`, chat completions, responses) uses for missing
fields. Read in vLLM 0.32 and 0.33: config/model.py (`get_diff_sampling_param`),
entrypoints/serve/utils/api_utils.py (`get_max_tokens`). `override_generation_config` cannot be used, because it also
bounds requests with a length. A `--generation-config` that names a folder replaces the default.
"""

from vllm_dlm.request.served_model import default_length


def get_diff_sampling_param(get):
    def get_with_canvas(self):
        found = get(self)
        if self.generation_config in ("auto", "vllm") and hasattr(self, "dlm_options"):
            found["max_tokens"] = default_length(self, found)
        return found

    return get_with_canvas
