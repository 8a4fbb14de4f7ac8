"""The length of a response nobody named: without it vLLM gives all that the model's length leaves.

To a canvas that would be the dearest answer there is, and often a wrong one.
The default is added to the model's default sampling parameters, from which
every front-end (`LLM.chat`, chat completions, responses) takes what a request
leaves out. Read in vLLM 0.32 and 0.33: config/model.py (`get_diff_sampling_param`),
entrypoints/serve/utils/api_utils.py (`get_max_tokens`). There
`override_generation_config` is a bound to larger requests, too, so it is not
the place; where `--generation-config` names a folder, all of the file is, and
then only what it says counts.
"""

from vllm_dlm.families import FAMILIES


def get_diff_sampling_param(get):
    def get_with_canvas(self):
        found = get(self)
        if self.generation_config in ("auto", "vllm") and hasattr(self, "dlm_canvas"):
            found["max_tokens"] = usual_length(self, found)
        return found

    return get_with_canvas


def usual_length(model_config, found: dict) -> int:
    """The server's default, else that of the checkpoint's generation_config.json, else the family's; where canvases
    grow as they are needed, all that there is room for."""
    usual = found.get("max_tokens", FAMILIES[model_config.architecture].canvas)
    if getattr(model_config, "dlm_grows", False):
        usual = model_config.max_model_len
    return model_config.dlm_canvas.length(usual)


def default_length(processor) -> int:
    """Of a request that says `max_tokens=None` to the engine itself, and whose canvas does not grow."""
    if not hasattr(processor, "dlm_default_length"):
        model = processor.model_config
        processor.dlm_default_length = usual_length(model, model.get_diff_sampling_param())
    return processor.dlm_default_length
