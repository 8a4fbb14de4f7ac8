"""Three of the tiny checkpoints in float64, written from their papers' definitions, and what a score of them is."""

import json
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.conftest import GOLDEN

#: of LLaDA's tensors -> as Qwen2 and Qwen3 call them
NAMES = {
    "transformer.wte": "embed_tokens",
    "transformer.ln_f": "norm",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    **{f"{one}_proj": f"self_attn.{one}_proj" for one in "qkv"},
}


def renamed(name: str) -> str:
    name = name.replace("model.transformer.ff_out", "lm_head").replace("transformer.blocks", "layers")
    if "self_attn" in name or "mlp" in name:
        return name
    for theirs, ours in NAMES.items():
        name = name.replace(f"{theirs}.", f"{ours}.")
    return name


class Stated:
    def __init__(self, checkpoint: str):
        path = GOLDEN / "checkpoints" / checkpoint
        self.config = json.loads((path / "config.json").read_text())
        tensors = load_file(path / "model.safetensors")
        self.weights = {renamed(name): tensor.double() for name, tensor in tensors.items()}
        self.mask_id = self.config["mask_token_id"]
        self.shift = int(self.config["model_type"] == "Dream")
        self.width = self.config.get("block_size")  # of blocks that see themselves and those before them
        self.heads = self.config.get("n_heads") or self.config["num_attention_heads"]
        self.layers = self.config.get("n_layers") or self.config["num_hidden_layers"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" not in self.weights:
            return x
        return (
            x
            * (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
            * self.weights[f"{name}.weight"]
        )

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """[L, H, D], rotated"""
        half = x.shape[-1] // 2
        frequency = self.config["rope_theta"] ** (-torch.arange(half).double() / half)
        angle = (torch.arange(len(x)).double()[:, None] * frequency)[:, None]
        pair = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag], -1)

    def logprobs(self, canvas: list[int]) -> torch.Tensor:
        """[L, V]: of the token at each position"""
        return self.logits(canvas).log_softmax(-1)

    def logits(self, canvas: list[int]) -> torch.Tensor:
        length = len(canvas)
        block = torch.arange(length) // (self.width or length)
        hidden = block[:, None] < block[None]  # [query, key]
        x = self.weights["model.embed_tokens.weight"][torch.tensor(canvas)]
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            h = self.norm(f"{name}.input_layernorm", x)
            q, k, v = (self.linear(f"{name}.self_attn.{one}_proj", h) for one in "qkv")
            q = q.view(length, self.heads, -1)
            k, v = (each.view(length, -1, q.shape[-1]) for each in (k, v))
            q, k = self.norm(f"{name}.self_attn.q_norm", q), self.norm(f"{name}.self_attn.k_norm", k)
            shared = self.heads // k.shape[1]
            q, k, v = self.turned(q), *(each.repeat_interleave(shared, 1) for each in (self.turned(k), v))
            score = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            context = torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, -torch.inf).softmax(-1), v)
            x = x + self.linear(f"{name}.self_attn.o_proj", context.flatten(1))
            h = self.norm(f"{name}.post_attention_layernorm", x)
            gate, up = self.linear(f"{name}.mlp.gate_proj", h), self.linear(f"{name}.mlp.up_proj", h)
            x = x + self.linear(f"{name}.mlp.down_proj", F.silu(gate) * up)
        logits = self.linear("lm_head", self.norm("model.norm", x))
        return torch.cat([logits[:1], logits[:-1]]) if self.shift else logits

    def guided(self, canvas: list[int], prompt: int, cfg_scale: float) -> torch.Tensor:
        logits = self.logits(canvas)
        if cfg_scale:
            unconditional = self.logits([self.mask_id] * prompt + canvas[prompt:])
            logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
        return logits.log_softmax(-1)

    # -- scores ----------------------------------------------------------------------------

    def blocks(self, context: list[int], answer: list[int], steps: int, cfg_scale: float = 0.0):
        """(log-probability of each token, whether each was the best): left to right in that many steps, of each block
        if the model knows them"""
        whole, start = context + answer, len(context)
        ends = [len(whole)]
        if self.width:
            ends = list(range(self.width * (start // self.width + 1), len(whole) + self.width, self.width))
        found, best = [], []
        for end in ends:
            last = min(end, len(whole))
            shares = np.array_split(np.arange(start, last), min(steps, last - start))  # the larger ones first
            for share in shares:
                canvas = whole[: share[0]] + [self.mask_id] * (end - share[0])
                logprobs = self.guided(canvas, len(context), cfg_scale)
                found += [logprobs[at, whole[at]].item() for at in share]
                best += [logprobs[at].argmax().item() == whole[at] for at in share]
            start = last
        return found, best

    def monte_carlo(self, context: list[int], answer: list[int], masks: list[list[int]], cfg_scale: float = 0.0):
        """The mean over draws, of which each masks some of the answer"""
        total = 0.0
        for masked in masks:
            noisy = [self.mask_id if at in masked else token for at, token in enumerate(answer)]
            logprobs = self.guided(context + noisy, len(context), cfg_scale)[len(context) :]
            total += sum(logprobs[at, answer[at]].item() for at in masked) * len(answer) / len(masked)
        return total / len(masks)


@cache
def stated(checkpoint: str) -> Stated:
    return Stated(checkpoint)
