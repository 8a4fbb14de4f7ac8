"""LLaDA in plain torch, with the hub's parameter names, for training and grading only."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import tokenizer as tok


@dataclass(frozen=True)
class Shape:
    width: int = 192
    layers: int = 4
    heads: int = 6
    feed_forward: int = 512
    vocabulary: int = tok.EMBEDDING_ROWS
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def rope_frequencies(self) -> Tensor:  # [head_dim / 2]
        even = torch.arange(0, self.head_dim, 2, dtype=torch.float32)
        return self.rope_theta ** (-even / self.head_dim)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position on [B, H, T, D], halves paired as in Llama and LLaDA."""
    cos, sin = angles
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    # The fused CPU kernel's backward pass is two to four times slower than this in bf16.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(-1).to(v.dtype) @ v


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        width, hidden = shape.width, shape.feed_forward
        self.heads = shape.heads
        self.attn_norm = RMSNorm(width, shape.norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, shape.norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def split(self, y: Tensor) -> Tensor:  # [B, T, W] -> [B, H, T, D]
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x_BTW: Tensor, angles, tail: int | None = None, old_keys=None):
        """`tail`: only the last rows go on. `old_keys`: K/V of rows not among x, put in front."""
        y_BTW = self.attn_norm(x_BTW)
        k = rotate(self.split(self.k_proj(y_BTW)), angles)
        v = self.split(self.v_proj(y_BTW))
        query_angles = angles
        if tail is not None:
            x_BTW, y_BTW = x_BTW[:, -tail:], y_BTW[:, -tail:]
            query_angles = tuple(a[-tail:] for a in angles)
        q = rotate(self.split(self.q_proj(y_BTW)), query_angles)
        if old_keys is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(old_keys, (k, v), strict=False))
        mixed = _attention(q.to(v.dtype), k.to(v.dtype), v)
        x_BTW = x_BTW + self.attn_out(mixed.transpose(1, 2).flatten(-2))
        y_BTW = self.ff_norm(x_BTW)
        return x_BTW + self.ff_out(F.silu(self.ff_proj(y_BTW)) * self.up_proj(y_BTW)), (k, v)


class DemoLLaDA(nn.Module):
    """Parameters are named `model.transformer.…`, so a state dict is a hub checkpoint."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.vocabulary, shape.width),
                "blocks": nn.ModuleList(Block(shape) for _ in range(shape.layers)),
                "ln_f": RMSNorm(shape.width, shape.norm_eps),
                "ff_out": nn.Linear(shape.width, shape.vocabulary, bias=False),
            }
        )

    @property
    def parts(self) -> nn.ModuleDict:
        return self.model.transformer

    def angles(self, first: int, last: int) -> tuple[Tensor, Tensor]:  # 2 x [T, head_dim / 2]
        turn = torch.outer(torch.arange(first, last).float(), self.shape.rope_frequencies())
        return turn.cos(), turn.sin()

    def forward(self, ids_BT: Tensor, tail: int, chosen_BR: Tensor | None = None) -> Tensor:
        """Logits [B, tail, V] of the last `tail` positions, or [N, V] of the chosen ones there."""
        x_BTW = self.parts.wte(ids_BT)
        angles = self.angles(0, ids_BT.shape[1])
        for block in self.parts.blocks[:-1]:
            x_BTW, _ = block(x_BTW, angles)
        # Nothing reads the other rows of the last layer but as keys and values.
        x_BRW, _ = self.parts.blocks[-1](x_BTW, angles, tail)
        if chosen_BR is not None:
            x_BRW = x_BRW[chosen_BR]
        return self.parts.ff_out(self.parts.ln_f(x_BRW)).float()

    def keys_and_values(self, ids_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's K (rotated) and V, [B, H, T, D]."""
        x_BTW, angles, kept = self.parts.wte(ids_BT), self.angles(0, ids_BT.shape[1]), []
        for block in self.parts.blocks:
            x_BTW, kv = block(x_BTW, angles)
            kept.append(kv)
        return kept

    def forward_on(self, prompt_kv, ids_BR: Tensor) -> Tensor:
        """Logits [B, R, V] of a canvas that reads the given, perhaps stale, prompt K/V."""
        start = prompt_kv[0][0].shape[2]
        x_BRW, angles = self.parts.wte(ids_BR), self.angles(start, start + ids_BR.shape[1])
        for block, kv in zip(self.parts.blocks, prompt_kv, strict=False):
            x_BRW, _ = block(x_BRW, angles, old_keys=kv)
        return self.parts.ff_out(self.parts.ln_f(x_BRW)).float()


def hub_config(shape: Shape) -> dict:
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.width,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.heads,
        "mlp_hidden_size": shape.feed_forward,
        "mlp_ratio": 4,
        "vocab_size": shape.vocabulary,
        "embedding_size": shape.vocabulary,
        "max_sequence_length": 4096,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "rope_full_precision": True,
        "rms_norm_eps": shape.norm_eps,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_type": "llama",
        "block_group_size": 1,
        "activation_type": "silu",
        "weight_tying": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "alibi": False,
        "alibi_bias_max": 8.0,
        "input_emb_norm": False,
        "scale_logits": False,
        "multi_query_attention": None,
        "flash_attention": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "init_cutoff_factor": None,
        "precision": "amp_bf16",
        "use_cache": False,
        "bos_token_id": tok.BOS,
        "eos_token_id": tok.EOS,
        "pad_token_id": tok.EOS,
        "mask_token_id": tok.MASK,
        "torch_dtype": "bfloat16",
    }


def save_checkpoint(model: DemoLLaDA, folder: Path) -> None:
    """Write the five files; weights last and by rename, so a reader never meets half a file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tok.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(hub_config(model.shape), indent=1) + "\n")
    generation = {
        "bos_token_id": tok.BOS,
        "eos_token_id": [tok.EOS, tok.EOT],
        "pad_token_id": tok.EOS,
        "max_new_tokens": 32,
    }  # longer than any answer
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    partial = folder / ".model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> DemoLLaDA:
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = DemoLLaDA(
        Shape(
            width=config["d_model"],
            layers=config["n_layers"],
            heads=config["n_heads"],
            feed_forward=config["mlp_hidden_size"],
            vocabulary=config["vocab_size"],
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
        )
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(dtype).eval()
