"""Policies by name, the demo's questions, and small statistics."""

import json
import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Policy:
    """How the engine is told to use a method: by the server's options or, by name, per request."""

    label: str
    server: dict = field(default_factory=dict)  # additional_config["dlm"]
    request: dict = field(default_factory=dict)  # extra_args

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """`REUSE[+SELECTION][:field=value,…]`. Fields of the reuse policy belong to the server, fields called dlm_…
        to the request."""
        from vllm_dlm.options import request_options, server_options

        name, _, given = text.partition(":")
        name, _, selection = name.partition("+")
        fields = dict(pair.split("=", 1) for pair in given.split(",")) if given else {}
        values = {key: literal(value) for key, value in fields.items()}
        request = {key: value for key, value in values.items() if key.startswith("dlm_")}
        own = {key: value for key, value in values.items() if key not in request}
        server = {"reuse": {"name": name} | own} if own else {}
        request |= ({} if own else {"dlm_reuse": name}) | ({"dlm_selection": selection} if selection else {})
        # An unknown name or field is rejected here, not after minutes.
        request_options(server_options(server, "low_confidence"), request)
        return cls(text, server, request)

    @property
    def key(self) -> str:
        """Policies of one server share an engine."""
        return json.dumps(self.server, sort_keys=True)


def literal(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def ragged(length: int, count: int) -> list[int]:
    """Lengths from half to one and a half times `length`, which is their mean"""
    shares = [0.5 + index / (count - 1) for index in range(count)] if count > 1 else [1.0]
    return [round(length * share) for share in shares]


def compare(names: list[str], got: list[list[int]], want: list[list[int]]) -> dict:
    """Texts that are equal token for token"""
    wrong = [triple for triple in zip(names, got, want, strict=True) if triple[1] != triple[2]]
    pairs = [pair for one, other in zip(got, want, strict=True) for pair in zip(one, other, strict=False)]
    found = {"cases": len(names), "right": len(names) - len(wrong)}
    found["agreement"] = sum(one == other for one, other in pairs) / len(pairs)
    return found | {"first": difference(*wrong[0]) if wrong else None}


def difference(name: str, got: list[int], want: list[int]) -> str:
    for at, (mine, theirs) in enumerate(zip(got, want, strict=False)):
        if mine != theirs:
            return f"{name}: token {at} is {mine} and not {theirs}"
    return f"{name}: {len(got)} tokens instead of {len(want)}"


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share"""
    share, bend = right / count, z * z / count
    middle = (share + bend / 2) / (1 + bend)
    half = z * math.sqrt(share * (1 - share) / count + bend / (4 * count)) / (1 + bend)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """Mean of the differences, and its 95% interval by Student's t"""
    from scipy import stats

    gaps = [value - before for value, before in zip(values, base, strict=True)]
    mean = sum(gaps) / len(gaps)
    half = stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)
    return mean, float(mean - half), float(mean + half)


def recall_questions(count: int, tokens: int, seed: int, filler: int = 7, needles: int = 8, queried: int = 2):
    """Prompts of exactly `tokens` tokens that hide codes, some of them asked for."""
    import numpy as np

    from examples.demo import tasks

    rng, sentences = np.random.default_rng(seed), tasks.Filler(filler)
    return [tasks.recall(rng, sentences, tokens, needles=needles, queried=queried) for _ in range(count)]


def requests_text(count: int) -> str:
    return f"{count} request{'s' * (count != 1)}"
