"""Random requests and random server options, from what is registered: a new method joins by being there.

Values are drawn by the type of a field, not by its meaning, so some combinations make no sense and are refused. A
request is plain data, and its `repr` is Python that makes it again.
"""

import random
import types
import typing
from dataclasses import dataclass, field, fields

from vllm_dlm.methods import KINDS, methods
from vllm_dlm.options import METHOD_KEYS, WINDOW, OptionError, request_options, server_options
from vllm_dlm.plugins.decoding.roles import RandomOrder

INTEGERS = (1, 2, 3, 4, 5, 8, 16, 32, 64)
FLOATS = (0.0, 1e-3, 0.05, 0.3, 0.5, 0.9, 0.995, 1.0, 1.5)
SHARES = (0, 0.3, 0.5, 1)
HOLES = ("[[{}]]", "[[{}:number]]", "[[{}:string]]", '[[{}:one of "a"|"bc"]]')
#: by the name of the field: what lets a method leave something out of prompts of a hundred tokens and short canvases
SMALL = {
    "min_context": 0,
    "min_prompt": 32,
    "page_size": 16,
    "budget_tokens": 64,
    "keep_sink": 4,
    "keep_tail": 8,
    "window": 2,
}
#: forwards of a request, as far as its numbers tell; longer ones are rare, since they take the time of many
USUAL_FORWARDS = 40


@dataclass(frozen=True)
class Given:
    """One request."""

    prompt: tuple[int, ...]
    fields: dict = field(default_factory=dict)  # of SamplingParams

    @property
    def prompt_ids(self) -> dict:
        return {"prompt_token_ids": list(self.prompt)}

    def params(self):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(**self.fields, output_kind=RequestOutputKind.FINAL_ONLY)


@dataclass(frozen=True)
class Model:
    """What the generator must know of a checkpoint as it is served."""

    max_len: int
    vocab_size: int
    mask_id: int


def names(kind: str) -> list[str]:
    """Every method of a kind, and every preset as "name/preset"."""
    return [
        name + preset
        for name, cls in sorted(methods(kind).items())
        for preset in ("", *(f"/{preset}" for preset in getattr(cls, "presets", {})))
    ]


def drawn_name(rng: random.Random, kind: str) -> str:
    """The methods are equally likely, however many presets they have."""
    method = rng.choice(sorted(methods(kind)))
    return rng.choice([name for name in names(kind) if name.partition("/")[0] == method])


def drawn_value(rng: random.Random, cls: type, name: str):
    hint = rng.choice(_kinds_of(typing.get_type_hints(cls)[name]))
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        return rng.choice(typing.get_args(hint))
    if origin is tuple:
        (number, *_) = typing.get_args(hint)
        return [0 if number is int else 0.5] * rng.randint(number is float, 2)
    if origin is str:  # nothing but the published settings tell what such a field accepts
        preset = [preset[name] for preset in getattr(cls, "presets", {}).values() if name in preset]
        return rng.choice([getattr(cls, name), *preset])
    return {
        bool: lambda: rng.choice((0, 1)),
        int: lambda: rng.choice(INTEGERS),
        float: lambda: rng.choice(FLOATS),
    }[origin]()


def _kinds_of(hint) -> list:
    return [
        kind
        for kind in (typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint])
        if kind is not type(None)
    ]


def edgy(rng: random.Random, most: int) -> int:
    """A length of 1 to `most`: mostly small, often at an edge of a block, sometimes at the limit."""
    edges = [e + d for e in (16, 32, 64, 128) for d in (-1, 0, 1)] + [1, 2, 3, most - 1, most]
    drawn = rng.choice([rng.randint(1, 12), rng.randint(1, 40), rng.randint(1, most), rng.choice(edges)])
    return max(1, min(drawn, most))


# -- servers -------------------------------------------------------------------------------


def drawn_server(rng: random.Random, default_decoding: str, selection: str) -> dict:
    """An object for `--dlm-config` whose `selection` has something to do at small lengths."""
    while True:
        given = {
            "reuse": _part(rng, "reuse", drawn_name(rng, "reuse")),
            "selection": _part(rng, "selection", selection),
        }
        for kind in ("decoding", "extent"):
            if rng.random() < 0.5:
                given[kind] = _part(rng, kind, drawn_name(rng, kind))
        given["selection"].update({k: v for k, v in SMALL.items() if k in _fields(methods("selection")[selection])})
        try:
            server_options(given, default_decoding)
            return given
        except OptionError:
            continue


def _fields(cls: type) -> list[str]:
    return [member.name for member in fields(cls)]


def _part(rng: random.Random, kind: str, name: str) -> dict:
    method, _, preset = name.partition("/")
    part = {"name": method} | ({"preset": preset} if preset else {})
    for member in _fields(methods(kind)[method]):
        if rng.random() < 0.3:
            part[member] = drawn_value(rng, methods(kind)[method], member)
    return part


# -- requests ------------------------------------------------------------------------------


def drawn_request(rng: random.Random, model: Model, server) -> Given:
    """`server`: its Options. May be refused."""
    while True:
        given = _request(rng, model, server)
        if forwards(given, model) <= USUAL_FORWARDS or rng.random() < 0.02:
            return given


def canvas_len(given: Given, model: Model) -> int:
    return min(given.fields.get("max_tokens") or model.max_len, model.max_len - len(given.prompt))


def forwards(given: Given, model: Model) -> int:
    """About how many."""
    steps = given.fields["extra_args"].get("dlm_steps")
    return given.prompt.count(model.mask_id) + (canvas_len(given, model) if steps is None else steps)


def most_forwards(given: Given, model: Model, server) -> int:
    """Of one sample: what the decoding says of each block; a block may begin with one that fills nothing."""
    length, decoding = canvas_len(given, model), request_options(server, given.fields["extra_args"]).decoding
    blocks = decoding.blocks(length)
    steps = [decoding.block_steps(index, len(blocks), end - start) for index, (start, end) in enumerate(blocks)]
    each = [decoding.most_steps(end - start, own) for (start, end), own in zip(blocks, steps, strict=True)]
    return given.prompt.count(model.mask_id) + sum(each) + 8


def _request(rng: random.Random, model: Model, server) -> Given:
    prompt = [rng.randrange(model.vocab_size) for _ in range(edgy(rng, model.max_len - 1))]
    if rng.random() < 0.15:
        share = rng.choice((0.1, 0.5, 1.0))
        prompt = [model.mask_id if rng.random() < share else token for token in prompt]
    length = edgy(rng, model.max_len - len(prompt))
    extra = _options(rng, server, length)
    fields_of = {"max_tokens": length, "ignore_eos": rng.random() < 0.6, "detokenize": False}
    if rng.random() < 0.02:
        del fields_of["max_tokens"]
    fields_of |= _sampling(rng, model)
    prompt, given = _given(rng, model, prompt, length)
    extra |= given | {name: 1 for name in ("dlm_trajectory", "dlm_frames") if rng.random() < 0.1}
    if fields_of["temperature"] or draws(server, extra) or rng.random() < 0.3:
        fields_of["seed"] = rng.choice((0, 1, 1 << 62, rng.getrandbits(31)))
    return Given(tuple(prompt), fields_of | {"extra_args": extra})


def _given(rng: random.Random, model: Model, prompt: list[int], length: int) -> tuple[list[int], dict]:
    """What is left of the prompt, and what the request gives of its canvas, more than one thing now and then."""
    extra: dict = {}
    if len(prompt) > 1 and rng.random() < 0.12:
        cut = len(prompt) - edgy(rng, len(prompt) - 1)
        prompt, extra["dlm_suffix"] = prompt[:cut], prompt[cut:]
    if rng.random() < 0.1:
        extra["dlm_start"] = [rng.randrange(model.vocab_size) for _ in range(rng.choice((1, length)))]
        if rng.random() < 0.7:
            extra["dlm_remask"] = rng.choice(SHARES)
    if rng.random() < 0.1:
        holes = [rng.choice(HOLES).format(rng.choice(INTEGERS[:6])) for _ in range(rng.randint(1, 3))]
        extra["dlm_template"] = rng.choice(("", "{", "a ")) + rng.choice((", ", " b")).join(holes)
    return prompt, extra


def draws(server, extra: dict) -> bool:
    """Whether a greedy request needs noise all the same: without a seed its random name would be one."""
    try:
        decoding = request_options(server, extra).decoding
    except ValueError:  # it will be refused
        return True
    return isinstance(decoding, RandomOrder) or getattr(decoding, "algorithm_temperature", 0) > 0


def _options(rng: random.Random, server, length: int) -> dict:
    extra = {key: drawn_name(rng, kind) for key, kind in METHOD_KEYS.items() if rng.random() < 0.7}
    if rng.random() < 0.4:
        extra["dlm_selection"] = server.selection.name  # with the server's own fields
    if rng.random() < 0.3:
        extra[WINDOW] = rng.choice((0, *INTEGERS))
    cls = methods("decoding")[extra.get("dlm_decoding", server.decoding.name).partition("/")[0]]
    for member in _fields(cls):
        if rng.random() < (0.5 if member in ("steps", "block_length") else 0.12):
            extra[f"dlm_{member}"] = drawn_value(rng, cls, member)
    if rng.random() < 0.8:
        extra = _without_what_does_not_go(server, extra)
    if "dlm_steps" in extra and rng.random() < 0.8:  # else most are refused: each block needs one
        width = extra.get("dlm_block_length") or getattr(server.decoding, "block_length", None) or length
        extra["dlm_steps"] = rng.randint(-(-length // width), max(-(-length // width), min(length, USUAL_FORWARDS)))
    return extra


def _without_what_does_not_go(server, extra: dict) -> dict:
    """Fields that are refused beside the others left away, one after the other."""
    while True:
        try:
            request_options(server, extra)
            return extra
        except OptionError as error:
            if error.field not in extra:
                return extra
            extra = {key: value for key, value in extra.items() if key != error.field}


def _sampling(rng: random.Random, model: Model) -> dict:
    drawn = {"temperature": rng.choice((0, 0, 0, 1e-3, 0.7, 1.0))}
    for name, values, chance in (
        ("top_p", (0.3, 0.9), 0.25),
        ("top_k", (1, 5, 50), 0.25),
        ("n", (2, 3), 0.1),
        ("logprobs", (0, 1, 3), 0.25),
        ("stop_token_ids", ([rng.randrange(model.vocab_size) for _ in range(40)],), 0.15),
    ):
        if rng.random() < chance:
            drawn[name] = rng.choice(values)
    if rng.random() < 0.1:
        drawn |= {"stop": rng.choice((["a"], ["e", " "])), "detokenize": True}
    if not drawn["temperature"]:
        drawn.pop("n", None)  # vLLM: greedy samples would all be the same
    return drawn


assert set(METHOD_KEYS.values()) == set(KINDS)
