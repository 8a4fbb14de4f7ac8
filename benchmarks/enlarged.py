"""A LLaDA checkpoint inside a larger LLaDA: the texts of the one at the price of the other.

Random weights are never sure of a token, and a small model's steps cost nothing
on a GPU: neither tells what a rule that fills several tokens is worth there. So
the small model computes in the first channels, heads and layers of the large
one, which reads all of its weights:

- A head's pair of channels i stands at the i-th of as many places, evenly
  spaced, where the wider head turns just as fast. Scores are divided by the
  root of the wider head, so queries are multiplied by the roots' ratio.
- Norms divide by the root of all channels: their weights take the ratio back,
  which rounds them once more in bfloat16.
- Heads and neurons beyond the small model's are random, and read by zeros:
  nothing they say comes into the first channels. All of what the further
  layers add is zero.
- Tokens beyond the vocabulary are told by one channel that all tokens share
  never to be probable.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu_shapes import Shape

RANDOM = 1e-3  # at most, of weights that change nothing
SHARED, REFUSED = 2.0**-8, -(2.0**20)  # of the last channel: what every token has, and what tokens of nobody make of it


class Enlarged:
    def __init__(self, folder: Path, shape: Shape):
        self.small = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")
        self.large, self.shape = shape.model, shape
        self.width, self.heads = self.small["d_model"], self.small["n_heads"]
        self.head_dim = self.width // self.heads
        self.ratio = math.sqrt(self.width / self.large.hidden)  # of norms
        if self.small["n_kv_heads"] != self.heads or self.large.heads != self.large.kv_heads:
            raise ValueError("queries that share keys are not told apart here: both models need n_kv_heads = n_heads")
        if self.large.head_dim % self.head_dim or self.large.hidden <= self.width:
            raise ValueError(f"{shape.name}: its heads must be a multiple of {self.head_dim} wide, its rows wider than "
                             f"{self.width}")  # fmt: skip

    def config(self, context: int) -> dict:
        own = {name: self.small[name] for name in ("rope_theta", "eos_token_id", "pad_token_id", "mask_token_id")}
        shrunk = self.small["rms_norm_eps"] * self.width / self.large.hidden
        return self.shape.config(context) | own | {"rms_norm_eps": shrunk}

    def weights(self, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Under the names of LLaDA's checkpoints"""
        generator = torch.Generator(device).manual_seed(0)

        def filled(name: str, *size: int) -> torch.Tensor:
            tensor = torch.empty(size, dtype=dtype, device=device).uniform_(-RANDOM, RANDOM, generator=generator)
            if len(size) == 1:
                tensor.fill_(self.ratio)
            if (small := self.tensors.get(name)) is not None:
                self._place(name.rsplit(".", 2)[-2], tensor, small.to(device, torch.float32))
            elif name.endswith(("attn_out.weight", ".ff_out.weight")):
                tensor.zero_()  # of a layer that the small model has not
            return tensor

        top, own = "model.transformer", self.large
        across = own.heads * own.head_dim
        yield (name := f"{top}.wte.weight"), filled(name, own.vocabulary, own.hidden)
        for layer in range(own.layers):
            block = f"{top}.blocks.{layer}"
            for part, size in (
                ("attn_norm", (own.hidden,)), ("q_proj", (across, own.hidden)), ("k_proj", (across, own.hidden)),
                ("v_proj", (across, own.hidden)), ("attn_out", (own.hidden, across)), ("ff_norm", (own.hidden,)),
                ("ff_proj", (own.ffn, own.hidden)), ("up_proj", (own.ffn, own.hidden)),
                ("ff_out", (own.hidden, own.ffn)),
            ):  # fmt: skip
                yield (name := f"{block}.{part}.weight"), filled(name, *size)
        yield (name := f"{top}.ln_f.weight"), filled(name, own.hidden)
        yield (name := f"{top}.ff_out.weight"), filled(name, own.vocabulary, own.hidden)

    def _place(self, part: str, large: torch.Tensor, small: torch.Tensor) -> None:
        """The small tensor in its place of the large one, which has its size and random values."""
        channels = self.width
        if small.ndim == 1:
            large[:channels] = small * self.ratio
        elif part == "wte":
            large[: len(small), :channels] = small
            large[:, -1] = SHARED
        elif part in ("q_proj", "k_proj", "v_proj"):
            rows = self._places(small.device)
            # All channels of these heads: between the places there is nothing.
            large[: self.heads * self.large.head_dim] = 0
            scale = math.sqrt(self.large.head_dim / self.head_dim) if part == "q_proj" else 1.0
            large[rows, :channels] = (small * scale).to(large.dtype)
        elif part in ("ff_proj", "up_proj"):
            large[: len(small)] = 0
            large[: len(small), :channels] = small
        elif part == "attn_out":
            large.zero_()
            large[:channels, self._places(small.device)] = small.to(large.dtype)
        elif len(small) == self.width:  # the feed-forward's way back
            large.zero_()
            large[:channels, : small.shape[1]] = small
        else:  # the head
            large[: len(small)] = 0
            large[len(small) :, :channels] = 0
            large[: len(small), :channels] = small
            large[len(small) :, -1] = REFUSED

    def _places(self, device: torch.device) -> torch.Tensor:
        """[heads * D] where the small heads' channels stand among all of the large ones"""
        half, stride = self.head_dim // 2, self.large.head_dim // self.head_dim
        pair = torch.arange(half, device=device) * stride
        one = torch.cat([pair, pair + self.large.head_dim // 2])
        return (torch.arange(self.heads, device=device)[:, None] * self.large.head_dim + one).flatten()


LOAD_FORMAT = "enlarged"


def folder_of(folder: Path, shape: Shape, parent: Path, context: int) -> Path:
    """What vLLM starts from, with `load_format=LOAD_FORMAT`: a config.json that says whose weights those are."""
    target = parent / f"{folder.name}-in-{shape.name}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(Enlarged(folder, shape).config(context), indent=1))
    return target


def register(folder: Path, shape: Shape) -> None:
    """Weights are made where the model is: 16 GB of them are in no file."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class Loader(BaseModelLoader):
        def download_model(self, model_config) -> None: ...

        def load_weights(self, model, model_config) -> None:
            one = next(model.parameters())
            model.load_weights(Enlarged(folder, shape).weights(one.device, one.dtype))
