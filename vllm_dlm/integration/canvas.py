"""The length of a response whose request names none. vLLM's default is all that the model's length leaves.

For a canvas that would be the most expensive length, and often a wrong one. So the default of the server is added to
the model's default sampling parameters, from which every front-end (`LLM.chat`, chat completions, responses) takes what
a request leaves out. Read in vLLM 0.32 and 0.33: config/model.py (`get_diff_sampling_param`),
entrypoints/serve/utils/api_utils.py (`get_max_tokens`). `override_generation_config` would not do, since it also
bounds requests that name a length. A `--generation-config` that names a folder replaces the default.
"""

from vllm_dlm.request.served_model import default_length


def get_diff_sampling_param(get):
    def get_with_canvas(self):
        found = get(self)
        if self.generation_config in ("auto", "vllm") and hasattr(self, "dlm_canvas"):
            found["max_tokens"] = default_length(self, found)
        return found

    return get_with_canvas
