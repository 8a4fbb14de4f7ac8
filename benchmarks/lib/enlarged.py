"""A LLaDA checkpoint inside a larger LLaDA: the texts of the small model at the cost of the large one.

Random weights are never sure of a token, and a small model's steps cost nothing on a GPU: neither shows what filling
several tokens per step is worth there. So the small model computes in the first channels, heads and layers of the large
one, which reads all of its weights:

- Pair i of a head's channels is at the i-th of evenly spaced places, where the wider head rotates at the same speed.
  Scores are divided by the root of the wider head, so queries are multiplied by the ratio of the roots.
- Norms divide by the root of all channels. Their weights compensate, with one more rounding in bfloat16.
- Heads and neurons beyond the small model's are random and multiplied by zeros, so nothing of them reaches the first
  channels. What further layers add is zero.
- Tokens beyond the vocabulary get an improbable logit from one channel that all tokens share.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.lib.models import Shape

RANDOM = 1e-3  # largest value of weights that change nothing
SHARED, REFUSED = 2.0**-8, -(2.0**20)  # last channel: what every token has, and its weight for unused tokens
PARTS = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
LOAD_FORMAT = "enlarged"


class Enlarged:
    def __init__(self, folder: Path, shape: Shape):
        self.small = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")
        self.large, self.shape = shape.model, shape
        self.width, self.heads = self.small["d_model"], self.small["n_heads"]
        self.head_dim = self.width // self.heads
        self.ratio = math.sqrt(self.width / self.large.hidden)  # of norms
        if self.small["n_kv_heads"] != self.heads or self.large.heads != self.large.kv_heads:
            raise ValueError("n_kv_heads: grouped queries are not supported, both models need n_kv_heads = n_heads")
        if self.large.head_dim % self.head_dim or self.large.hidden <= self.width:
            sizes = f"heads a multiple of {self.head_dim} wide, rows wider than {self.width}"
            raise ValueError(f"{shape.name}: it must have {sizes}")

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
                tensor.zero_()  # this layer is not in the small model
            return tensor

        top, own = "model.transformer", self.large
        across = own.heads * own.head_dim
        sizes = dict.fromkeys(PARTS, (across, own.hidden)) | dict.fromkeys(
            ("ff_proj", "up_proj"), (own.ffn, own.hidden)
        )
        sizes |= {"attn_norm": (own.hidden,), "ff_norm": (own.hidden,)}
        sizes |= {"attn_out": (own.hidden, across), "ff_out": (own.hidden, own.ffn)}
        yield (name := f"{top}.wte.weight"), filled(name, own.vocabulary, own.hidden)
        for layer in range(own.layers):
            block = f"{top}.blocks.{layer}"
            for part in PARTS:
                yield (name := f"{block}.{part}.weight"), filled(name, *sizes[part])
        yield (name := f"{top}.ln_f.weight"), filled(name, own.hidden)
        yield (name := f"{top}.ff_out.weight"), filled(name, own.vocabulary, own.hidden)

    def _place(self, part: str, large: torch.Tensor, small: torch.Tensor) -> None:
        """Writes the small tensor into the large one, which has random values."""
        channels = self.width
        if small.ndim == 1:
            large[:channels] = small * self.ratio
        elif part == "wte":
            large[: len(small), :channels] = small
            large[:, -1] = SHARED
        elif part in ("q_proj", "k_proj", "v_proj"):
            rows = self._places(small.device)
            # All channels of these heads: those between the places are 0.
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
        """[heads * D]: index of each channel of the small heads in the large ones"""
        half, stride = self.head_dim // 2, self.large.head_dim // self.head_dim
        pair = torch.arange(half, device=device) * stride
        one = torch.cat([pair, pair + self.large.head_dim // 2])
        return (torch.arange(self.heads, device=device)[:, None] * self.large.head_dim + one).flatten()


def folder_for(folder: Path, shape: Shape, parent: Path, context: int) -> Path:
    """A folder with a config.json, which vLLM starts from with `load_format=LOAD_FORMAT`"""
    target = parent / f"{folder.name}-in-{shape.name}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(Enlarged(folder, shape).config(context), indent=1))
    return target


def register(folder: Path, shape: Shape) -> None:
    """Weights are made on the device: no file holds the 16 GB."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class Loader(BaseModelLoader):
        def download_model(self, model_config) -> None: ...

        def load_weights(self, model, model_config) -> None:
            one = next(model.parameters())
            model.load_weights(Enlarged(folder, shape).weights(one.device, one.dtype))
