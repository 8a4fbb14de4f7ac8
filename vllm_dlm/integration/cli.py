"""`--plugin`, `--dlm-config` and `--dlm-view` for vLLM's commands.

vLLM has no hook for flags of plugins, but it loads general plugins before it
creates its parser. Read in vLLM 0.32 and 0.33: engine/arg_utils.py.
"""

import argparse
import json

from vllm_dlm.configuration import is_diffusion_lm
from vllm_dlm.families import FAMILIES, record_of
from vllm_dlm.options import OptionError, server_options
from vllm_dlm.shown import shown


def add_cli_args(add):
    def add_with_dlm(parser):
        parser = add(parser)
        group = parser.add_argument_group(title="vllm_dlm", description="Masked-diffusion language models.")
        group.add_argument(
            "--plugin",
            choices=["vllm_dlm"],
            help="The plugin that serves the model. It is also active without this flag.",
        )
        group.add_argument(
            "--dlm-config",
            type=dlm_config,
            metavar="JSON",
            help='Options of denoising: {"decoding": {"name": …}, "reuse": {"name": …}, "selection": {"name": …}, '
            '"canvas": {"default": …, "max": …}}.',
        )
        group.add_argument(
            "--dlm-view",
            action="store_true",
            help="Serve a page at /dlm that shows canvases while they are filled, including requests with dlm_watch.",
        )
        return parser

    return add_with_dlm


def from_cli_args(make):
    def from_with_dlm(cls, args):
        engine_args = make(cls, args)
        if (written := getattr(args, "dlm_config", None)) is not None:
            if "dlm" in (engine_args.additional_config or {}):
                raise ValueError('--dlm-config: --additional-config already has a "dlm" object; use one of them')
            engine_args.additional_config = {**(engine_args.additional_config or {}), "dlm": written}
        if getattr(args, "dlm_view", False):
            if (getattr(args, "api_server_count", None) or 1) > 1:
                raise ValueError(
                    f"--dlm-view: not supported with {args.api_server_count} API servers, each of which has separate "
                    "requests; add --api-server-count 1"
                )
            engine_args.additional_config = {**(engine_args.additional_config or {}), "dlm_view": True}
        return engine_args

    return from_with_dlm


def set_defaults(set_theirs):
    def set_defaults_with_dlm(self, model_config):
        if is_diffusion_lm(model_config):
            refuse_switched_on(self, model_config)
        return set_theirs(self, model_config)

    return set_defaults_with_dlm


#: engine argument -> why it is not supported
SWITCHED_OFF = {
    "enable_prefix_caching": "the keys of a prompt depend on its response, so no other request can share them",
    "enable_chunked_prefill": "the plan of a canvas determines the rows of each step",
    "async_scheduling": "each step needs the tokens of the previous one",
}


def refuse_switched_on(engine_args, model_config) -> None:
    # vLLM writes its defaults into the same object, from which another configuration may be created.
    asked = engine_args.__dict__.setdefault("_dlm_asked", {name: getattr(engine_args, name) for name in SWITCHED_OFF})
    for name, why in SWITCHED_OFF.items():
        if name == "enable_prefix_caching" and record_of(model_config).attention == "block_causal":
            model_config.dlm_prefixes_wanted = bool(asked[name])  # see DiffusionConfigHook
        elif asked[name]:
            raise ValueError(
                f"{name}: not supported with masked-diffusion language models, because {why}; start without it"
            )


def dlm_config(text: str) -> dict:
    """Rejects an object that is invalid for every family, for a one-line error from argparse. Other checks need the
    model and run later."""
    written = json_object(text)
    errors = []
    for family in FAMILIES.values():
        try:
            server_options(written, family.decoding, family.presets)
        except OptionError as error:
            errors.append(error)
    if len(errors) == len(FAMILIES):
        raise argparse.ArgumentTypeError(str(errors[0]))
    return written


def json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a JSON object")
    return value
