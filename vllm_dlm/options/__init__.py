"""Options of a server and of a request. Parses and validates them; errors name the invalid field.

A server takes one object: four methods, each `{"name": …, **fields}`, the
bounds of a canvas, and limits. A request can override fields of the decoding as
`dlm_<field>` and choose other methods by name. Options are plain data without
tensors.
"""

from vllm_dlm.options.options import CanvasBounds, Options, suited
from vllm_dlm.options.request import (
    METHOD_KEYS,
    RENAMED,
    REQUEST_FIELDS,
    WINDOW,
    current_names,
    request_keys,
    request_options,
)
from vllm_dlm.options.server import server_options
from vllm_dlm.options.types import OptionError

__all__ = [
    "METHOD_KEYS",
    "RENAMED",
    "REQUEST_FIELDS",
    "WINDOW",
    "CanvasBounds",
    "OptionError",
    "Options",
    "current_names",
    "request_keys",
    "request_options",
    "server_options",
    "suited",
]
