"""A checked request comes out of vLLM's serialisation as it went in, whatever methods it names."""

from contextlib import suppress

import pytest
from vllm import SamplingParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_dlm.methods import KINDS, methods
from vllm_dlm.options import METHOD_KEYS, OptionError, Options, request_options, server_options
from vllm_dlm.options.scored import SCORE
from vllm_dlm.options.texts import Layout
from vllm_dlm.request.canvas_request import CANVAS_REQUEST, CanvasRequest

FULL = server_options({"decoding": {"threshold": 0.7}, "canvas": {"max": 99}}, "low_confidence")
BLOCKS = server_options(None, "low_confidence_dynamic", attention="block_causal", block_length=4)
LAYOUT = Layout(suffix=2, start=[5, 6], holes=[(0, 2, 0)], automata=[{"a": [1]}], ends=[9], remask=0.25)


def received(request: CanvasRequest, server) -> CanvasRequest:
    params = SamplingParams(max_tokens=request.max_tokens)
    params.extra_args = {CANVAS_REQUEST: request.to_wire()}
    sent = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    return CanvasRequest.from_wire(sent.extra_args[CANVAS_REQUEST], server, request.prompt_ids, sent.max_tokens)


def asked() -> list[dict]:
    """Every registered method with each of its presets, one at a time, and some options together"""
    keys = {kind: key for key, kind in METHOD_KEYS.items()}
    found = [{"dlm_frames": 1, "dlm_watch": 1, "dlm_trajectory": 1}, {"dlm_infill": 1}]
    for kind in KINDS:
        for name, cls in methods(kind).items():
            presets = getattr(cls, "presets", {})
            found += [{keys[kind]: each} for each in (name, *(f"{name}/{preset}" for preset in presets))]
    return [*found, {SCORE: {"start": 2, "answer": [3, 4], "masked": [1]}, "dlm_steps": 2}]


@pytest.mark.parametrize("server", [FULL, BLOCKS], ids=["full", "block-causal"])
def test_options_travel(server):
    travelled = 0
    for options in asked():
        with suppress(OptionError):  # not for this server
            wanted = request_options(server, options)
            assert_travels(wanted, server)
            travelled += 1
    assert travelled >= 20


def assert_travels(wanted: Options, server: Options) -> None:
    found = received(CanvasRequest(wanted, LAYOUT, [1, 2, 3], 7, 10), server)
    for kind in KINDS:
        assert getattr(found.options, kind) == getattr(wanted, kind)
    for field in ("canvas", "limits", "attention", "frames", "watch", "trajectory"):
        assert getattr(found.options, field) == getattr(wanted, field)
    assert (found.prompt_ids, found.max_tokens, found.length) == ([1, 2, 3], 7, 10)
    assert found.layout.to_wire() == LAYOUT.to_wire() | {"holes": [[0, 2, 0]]}


def test_an_empty_layout_travels():
    found = received(CanvasRequest(FULL, Layout(), [1], 2, 3), FULL)
    assert found.layout == Layout() and found.options == FULL
