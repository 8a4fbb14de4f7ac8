"""Recognises checkpoints with another model's model_type in config.json, such as Llama's, by their architecture.

No config class is registered for such a model_type, so other models with it are read as without this plugin: alone, as
the text part of another model, or as a draft model. Read in vLLM 0.32 and 0.33: transformers_utils/config.py
(`HFConfigParser`), where each config.json is read first.
"""

from typing import Any

from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_dlm.configuration import LEFT
from vllm_dlm.families import FAMILIES
from vllm_dlm.families.family import Family, imported


def parse(theirs):
    def parse_by_architecture(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
        overrides = kwargs.get("hf_overrides")
        try:
            fields = get_hf_file_to_dict("config.json", model, revision) or {}
        except ValueError:
            fields = {}  # not JSON; vLLM reports it
        family = family_of(fields, overrides if isinstance(overrides, dict) else {})
        if family is None:
            return theirs(self, model, trust_remote_code, revision=revision, code_revision=code_revision, **kwargs)
        fields = {name: value for name, value in fields.items() if name != "model_type"}
        return fields, imported(family.config).from_dict(fields, name_or_path=str(model))

    return parse_by_architecture


def family_of(fields: dict[str, Any], overrides: dict[str, Any]) -> Family | None:
    """The family of a checkpoint with another model's model_type"""
    named = overrides.get("architectures", fields.get("architectures"))
    for name in named if isinstance(named, list) else ():
        family = FAMILIES.get(name) if isinstance(name, str) else None
        shared = None if family is None or name in LEFT else family.written_model_type
        if shared is not None and shared == fields.get("model_type"):
            return family
    return None
