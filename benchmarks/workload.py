"""What is measured: a method asked for in some way, on prompts of some lengths."""

import json
from dataclasses import dataclass, field, replace

from benchmarks.checkpoints import Shape

BLOCK = 32  # block_length of LLaDA's README, for the engine and the reference loop


@dataclass(frozen=True)
class Policy:
    """How the engine is asked for a method: by the server's options or, by name, per request."""

    label: str
    server: dict = field(default_factory=dict)  # additional_config["dlm"]
    request: dict = field(default_factory=dict)  # extra_args

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """`REUSE[+SELECTION]` or `REUSE[+SELECTION]:field=value,…` -> per request or, with fields (of the reuse
        policy), per server. Fields called dlm_… are options of the request."""
        from vllm_dlm.options import request_options, server_options

        name, _, given = text.partition(":")
        name, _, selection = name.partition("+")
        fields = dict(pair.split("=", 1) for pair in given.split(",")) if given else {}
        values = {key: literal(value) for key, value in fields.items()}
        request = {key: value for key, value in values.items() if key.startswith("dlm_")}
        if own := {key: value for key, value in values.items() if key not in request}:
            policy = cls(text, {"reuse": {"name": name} | own}, request)
        else:
            policy = cls(text, {}, {"dlm_reuse": name} | request)
        if selection:
            policy.request["dlm_selection"] = selection
        # An unknown name or field is refused here, with the list of valid ones, not after minutes.
        request_options(server_options(policy.server, "low_confidence"), policy.request)
        return policy


@dataclass(frozen=True)
class Cell:
    prompt: int
    new: int
    batch: int
    blocks: int  # blocks of the response that are awaited; the canvas always has all of them
    steps_per_block: int = BLOCK  # one token per step; fewer where only the time of a step is wanted

    @property
    def steps(self) -> int:
        return self.blocks * self.steps_per_block

    def short(self, steps: int) -> "Cell":
        """The first `steps` steps' worth of time: for `none`, whose steps all cost the same."""
        return replace(self, blocks=1, steps_per_block=steps)

    def lengths(self) -> list[int]:
        """Ragged around the stated length, which is their mean."""
        spread = [0.5 + i / (self.batch - 1) for i in range(self.batch)] if self.batch > 1 else [1.0]
        return [round(self.prompt * share) for share in spread]

    def prompts(self, shape: Shape) -> list[list[int]]:
        import numpy as np

        draw = np.random.default_rng(self.prompt)
        return [draw.integers(0, shape.eos_id, length).tolist() for length in self.lengths()]

    def rows(self) -> int:
        return sum(self.lengths()) + self.batch * self.new

    def dense_flops(self, shape: Shape) -> int:
        return sum(shape.dense_flops(length + self.new, self.steps) for length in self.lengths())


def literal(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
