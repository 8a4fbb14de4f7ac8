"""Reads vLLM's configuration: whether this plugin serves the model, and the server's options.

This module is at the bottom of the layout. The integration, metrics, the live view, scoring and page-sparse attention
import it.
"""

from dataclasses import fields
from typing import Any

from vllm_dlm.families import FAMILIES, record_of
from vllm_dlm.options import OptionError, Options, server_options

#: key of config.json (training/settings.py) and name of the selection
TRAINED = "unique"
#: architectures of FAMILIES that are left to vLLM or another plugin
LEFT: set[str] = set()


def is_diffusion_lm(model_config) -> bool:
    """Whether this plugin serves the model."""
    return model_config is not None and model_config.architecture in FAMILIES and model_config.architecture not in LEFT


def resolved_options(vllm_config) -> Options:
    """Parses the server's options for a model that this plugin serves."""
    family = record_of(vllm_config.model_config)
    block_length = getattr(vllm_config.model_config.hf_config, "block_size", None)
    return server_options(options_object(vllm_config), family.decoding, family.presets, family.attention, block_length)


def server_options_of(model_config) -> Options:
    """The server's options, parsed by DiffusionConfigHook and sent to the engine with the configuration."""
    return model_config.dlm_options


def written_object(vllm_config) -> Any:
    """The server's "dlm" object as written by its operator"""
    return (vllm_config.additional_config or {}).get("dlm")


def options_object(vllm_config) -> Any:
    """The server's "dlm" object. If it names the selection `unique`, fields in the checkpoint's config.json are its
    defaults. Otherwise the checkpoint has no effect."""
    written = written_object(vllm_config)
    selection = written.get("selection") if isinstance(written, dict) else None
    if not isinstance(selection, dict) or selection.get("name") != TRAINED:
        return written
    return written | {"selection": trained_fields(vllm_config.model_config.hf_config) | selection}


def trained_fields(config) -> dict[str, Any]:
    """Fields of the selection that `vllm_dlm.training` stored in a checkpoint's config.json"""
    trained = getattr(config.get_text_config(), TRAINED, None)
    if not isinstance(trained, dict):
        return {}
    from vllm_dlm.plugins.selection.unique import Unique

    known = {field.name for field in fields(Unique)}  # the other entries describe the training
    return {name: value for name, value in trained.items() if name in known}


# -- autoregressive models ---------------------------------------------------------------------


def selection_of(vllm_config):
    """The selection for an autoregressive model; None: vLLM serves the model unchanged."""
    if vllm_config.model_config is None or is_diffusion_lm(vllm_config.model_config):
        return None
    written = options_object(vllm_config)
    if written is None:
        return None
    selection = autoregressive_options(written).selection
    return selection if selection.autoregressive else None


def autoregressive_options(written: Any) -> Options:
    """Parses a "dlm" object that may only have a selection."""
    options = server_options(written, "low_confidence")  # the decoding is not used
    for part in ("decoding", "reuse", "extent", "canvas"):
        if part in written:
            raise OptionError(
                part,
                f"dlm.{part}: only for masked-diffusion language models; autoregressive models take only selection",
            )
    if not options.selection.autoregressive and options.selection.name != "none":
        raise OptionError(
            "dlm.selection.name",
            f"dlm.selection.name: {options.selection.name!r} is not supported by autoregressive models",
        )
    return options
