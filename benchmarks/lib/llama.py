"""A plain statement of a Llama model in torch, float32, whose last positions may read chosen keys only.

The keys of a prompt are computed once and stored. Each configuration then recomputes only the positions after it, with
the true tokens as input. Independent of vLLM and of the engines of this project.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

#: (layer, queries [R, H, D], keys [Hkv, T, D]) -> keys that each query may read [Hkv, R, T] bool; None: all before it
Visible = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


@dataclass
class Prompt:
    """Keys and values of the first `length` tokens, after rotation."""

    keys: torch.Tensor  # [layers, Hkv, length, D]
    values: torch.Tensor  # [layers, Hkv, length, D]

    @property
    def length(self) -> int:
        return self.keys.shape[2]


class Llama:
    def __init__(self, state: dict[str, torch.Tensor], config: dict):
        self.state, self.eps, self.layers = state, config["rms_norm_eps"], config["num_hidden_layers"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads
        theta = config["rope_parameters"]["rope_theta"]
        self.frequencies = theta ** -(torch.arange(0, self.dim, 2).float() / self.dim)  # [D / 2]

    @classmethod
    def load(cls, folder: Path) -> "Llama":
        from safetensors.torch import load_file

        return cls(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()))

    @classmethod
    def random(cls, layers: int = 4, heads: int = 4, kv_heads: int = 2, dim: int = 32, vocabulary: int = 256):
        """A tiny model with random weights"""
        draw, hidden = torch.Generator().manual_seed(0), heads * dim
        shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
        for layer in range(layers):
            name = f"model.layers.{layer}."
            shapes |= {f"{name}self_attn.{part}_proj": (hidden, hidden) for part in "qo"}
            shapes |= {f"{name}self_attn.{part}_proj": (kv_heads * dim, hidden) for part in "kv"}
            shapes |= {f"{name}mlp.{part}_proj": (2 * hidden, hidden) for part in ("gate", "up")}
            shapes |= {f"{name}mlp.down_proj": (hidden, 2 * hidden)}
            shapes |= {f"{name}{part}_layernorm": (hidden,) for part in ("input", "post_attention")}
        state = {
            f"{name}.weight": torch.randn(shape, generator=draw) * shape[-1] ** -0.5
            if len(shape) == 2
            else torch.ones(shape)
            for name, shape in shapes.items()
        }
        config = {"rms_norm_eps": 1e-5, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": dim}
        config |= {"num_key_value_heads": kv_heads, "rope_parameters": {"rope_theta": 1e4}}
        return cls(state, config)

    def prompt(self, ids: list[int]) -> Prompt:
        """Reads a prompt densely"""
        none = torch.empty(self.layers, self.kv_heads, 0, self.dim)
        _, keys, values = self._run(ids, Prompt(none, none), None)
        return Prompt(keys, values)

    def losses(self, ids: list[int], targets: list[int], prompt: Prompt, visible: Visible | None = None):
        """Negative log-likelihood [R] of the targets of the tokens that follow a prompt"""
        x, _, _ = self._run(ids, prompt, visible)
        head = self.state.get("lm_head.weight", self.state["model.embed_tokens.weight"])
        logits = self._norm(x, "model.norm.weight") @ head.T
        return F.cross_entropy(logits, torch.tensor(targets), reduction="none")

    def _run(self, ids: list[int], prompt: Prompt, visible: Visible | None):
        x = self.state["model.embed_tokens.weight"][torch.tensor(ids)]  # [R, hidden]
        angle = (prompt.length + torch.arange(len(ids)))[:, None] * self.frequencies
        turn = angle.cos(), angle.sin()  # [R, D / 2]
        keys, values = [], []
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            h = self._norm(x, f"{name}input_layernorm.weight")
            q, k, v = (self._linear(h, f"{name}self_attn.{part}_proj.weight") for part in "qkv")
            q, k, v = (part.unflatten(1, (-1, self.dim)) for part in (q, k, v))  # [R, heads, D]
            q, k, v = rotate(q, turn), rotate(k, turn).transpose(0, 1), v.transpose(0, 1)
            keys.append(k)
            values.append(v)
            own = k, v
            if prompt.length:
                own = torch.cat([prompt.keys[layer], k], 1), torch.cat([prompt.values[layer], v], 1)
            mask = None if visible is None else visible(layer, q, own[0])
            context = attend(q, *own, mask).flatten(1)  # [R, H * D]
            x = x + self._linear(context, f"{name}self_attn.o_proj.weight")
            h = self._norm(x, f"{name}post_attention_layernorm.weight")
            gate, up = (self._linear(h, f"{name}mlp.{part}_proj.weight") for part in ("gate", "up"))
            x = x + self._linear(F.silu(gate) * up, f"{name}mlp.down_proj.weight")
        return x, torch.stack(keys), torch.stack(values)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.state[name].T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.state[name], self.eps)


def rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """[R, heads, D] -> the same, each pair (c, c + D / 2) turned"""
    (first, second), (cos, sin) = x.chunk(2, -1), (part[:, None] for part in turn)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q [R, H, D] of the last R of T positions, keys and values [Hkv, T, D], mask [Hkv, R, T] or None (all before a
    position) -> [R, H, D]"""
    (rows, heads, dim), (kv_heads, length) = q.shape, keys.shape[:2]
    group = heads // kv_heads
    if mask is None and rows == length:  # a whole prompt
        every = (part.repeat_interleave(group, 0) for part in (keys, values))
        return F.scaled_dot_product_attention(q.transpose(0, 1), *every, is_causal=True).transpose(0, 1)
    if mask is None:
        mask = causal(rows, length)
    rows_of = q.transpose(0, 1).unflatten(0, (kv_heads, group))  # [Hkv, G, R, D]
    logits = (rows_of.flatten(1, 2) * dim**-0.5 @ keys.mT).unflatten(1, (group, rows))  # [Hkv, G, R, T]
    weights = logits.masked_fill_(~mask.expand(kv_heads, rows, length)[:, None], -torch.inf).softmax(-1)
    return (weights.flatten(1, 2) @ values).unflatten(1, (group, rows)).flatten(0, 1).transpose(0, 1)


def causal(rows: int, length: int) -> torch.Tensor:
    """[R, T] bool: what the last R of T positions see"""
    return torch.arange(length) <= torch.arange(length - rows, length)[:, None]
