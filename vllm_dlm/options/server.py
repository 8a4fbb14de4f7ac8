"""Parses the options of a server: the object of `--dlm-config`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_dlm.methods import KINDS
from vllm_dlm.options.build import build, build_method
from vllm_dlm.options.limits import Limits
from vllm_dlm.options.options import CanvasBounds, Options, suited
from vllm_dlm.options.types import OptionError
from vllm_dlm.shown import shown

#: parts of the server's object
PARTS = (*KINDS, "canvas", "limits", "preset")


def server_options(
    written: Mapping[str, Any] | None,
    default_decoding: str,
    presets: Mapping[str, dict] | None = None,
    attention: str = "full",
    block_length: int | None = None,
) -> Options:
    """Parses the object of `--dlm-config` or `additional_config["dlm"]`. `presets`: such objects by name; `attention`:
    the model's mask kind; `block_length`: block length of its training"""
    written = {} if written is None else written
    if not isinstance(written, Mapping):
        raise OptionError("dlm", f"dlm: {shown(written)} is not an object with the parts {', '.join(PARTS)}")
    for part in written:
        if part not in PARTS:
            raise OptionError(part, f"dlm: unknown part {shown(part)}, valid parts are {', '.join(PARTS)}")
    if "preset" in written:
        written = _upon_preset(written, presets or {})
    default = {"decoding": default_decoding, "reuse": "none", "selection": "none", "extent": "full"}
    chosen = {kind: build_method(kind, written.get(kind), default[kind]) for kind in KINDS}
    asked = written.get("decoding") or {}
    if block_length is not None and "block_length" not in asked and "preset" not in asked:
        chosen["decoding"] = replace(chosen["decoding"], block_length=block_length)
    canvas = build(CanvasBounds, "canvas", written.get("canvas"), {})
    limits = build(Limits, "limits", written.get("limits"), {})
    return suited(Options(**chosen, canvas=canvas, limits=limits, attention=attention), "dlm.")


def _upon_preset(written: Mapping[str, Any], presets: Mapping[str, dict]) -> dict[str, Any]:
    """Parts of the preset, overridden by `written`. Fields in `written` replace single fields of a part; a named method
    replaces the whole part."""
    name, listed = written["preset"], ", ".join(presets) or "none"
    if not isinstance(name, str) or name not in presets:
        raise OptionError("dlm.preset", f"dlm.preset: {shown(name)} is unknown, valid for this model are {listed}")
    parts = dict(presets[name])
    for part, value in written.items():
        if part != "preset":
            fields_alone = isinstance(value, Mapping) and "name" not in value
            parts[part] = {**parts.get(part, {}), **value} if fields_alone else value
    return parts
