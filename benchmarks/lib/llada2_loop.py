"""LLaDA2's published loop: no cache, each step runs everything up to the end of the block."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.lib.loops import Loop, block_mask, fill, most_probable


class LLaDA2(Loop):
    """The hub's code in plain torch: experts one after the other, each over its rows."""

    def __init__(self, config: dict, dtype: torch.dtype):
        self.config, self.dtype, self.mask_id = config, dtype, config["mask_token_id"]
        self.own: dict[str, torch.Tensor] = {}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        self.own = {
            name: tensor if "mlp.gate" in name and "proj" not in name else tensor.to(self.dtype)
            for name, tensor in weights.items()
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """Random ones"""
        draw, made = torch.Generator().manual_seed(0), {}
        for name, size in self._sizes():
            random = torch.empty(size).normal_(0, 0.05, generator=draw)
            made[name] = torch.zeros(size) if "bias" in name else torch.ones(size) if len(size) == 1 else random
        return made

    def _sizes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        config = self.config
        width, dim, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]

        def gated(name: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            for part in ("gate_proj", "up_proj"):
                yield f"{name}.{part}.weight", (inner, width)
            yield f"{name}.down_proj.weight", (width, inner)

        yield "model.word_embeddings.weight", (config["vocab_size"], width)
        for layer in range(config["num_hidden_layers"]):
            own = f"model.layers.{layer}"
            qkv = (heads + 2 * config["num_key_value_heads"]) * dim
            yield f"{own}.attention.query_key_value.weight", (qkv, width)
            yield f"{own}.attention.dense.weight", (width, heads * dim)
            for name in ("attention.query_layernorm", "attention.key_layernorm"):
                yield f"{own}.{name}.weight", (dim,)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{own}.{name}.weight", (width,)
            if layer < config["first_k_dense_replace"]:
                yield from gated(f"{own}.mlp", config["intermediate_size"])
                continue
            yield f"{own}.mlp.gate.weight", (config["num_experts"], width)
            yield f"{own}.mlp.gate.expert_bias", (config["num_experts"],)
            for name in ("shared_experts", *(f"experts.{expert}" for expert in range(config["num_experts"]))):
                yield from gated(f"{own}.mlp.{name}", config["moe_intermediate_size"])
        yield "model.norm.weight", (width,)
        yield "lm_head.weight", (config["vocab_size"], width)

    @torch.inference_mode()
    def generate_steps(self, prompt: list[int], new: int, block: int, steps: int) -> Iterator[torch.Tensor]:
        first, length = len(prompt) // block * block, -(-(len(prompt) + new) // block) * block
        tokens = self.canvas(prompt, length)
        for start in range(first, length, block):
            end = start + block
            mask = block_mask(torch.arange(end), end, block, self.dtype)

            def guess(_, end=end, mask=mask, start=start) -> tuple[torch.Tensor, torch.Tensor]:
                return most_probable(self.forward(tokens[:end], mask)[start:end])

            for _ in fill(tokens[start:end], guess, self.mask_id, steps):
                yield tokens[len(prompt) : len(prompt) + new]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """-> logits [T, V]"""
        config = self.config
        heads, kv_heads, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        turned = int(dim * config["partial_rotary_factor"])
        frequency = config["rope_theta"] ** -(torch.arange(0, turned, 2).float() / turned)
        angles = torch.outer(torch.arange(len(ids)).float(), frequency)
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        x = self.own["model.word_embeddings.weight"][ids]
        for layer in range(config["num_hidden_layers"]):
            own = f"model.layers.{layer}"
            h = self._normed(x, f"{own}.input_layernorm")
            qkv = self._linear(h, f"{own}.attention.query_key_value").unflatten(-1, (-1, dim)).transpose(0, 1)
            q, k, v = qkv.split([heads, kv_heads, kv_heads])
            q = rotated(self._normed(q, f"{own}.attention.query_layernorm"), cos, sin)
            k = rotated(self._normed(k, f"{own}.attention.key_layernorm"), cos, sin)
            mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
            x = x + self._linear(mixed.transpose(0, 1).flatten(1), f"{own}.attention.dense")
            h = self._normed(x, f"{own}.post_attention_layernorm")
            sparse = layer >= config["first_k_dense_replace"]
            x = x + (self._experts(h, f"{own}.mlp") if sparse else self._gated(h, f"{own}.mlp"))
        return self._linear(self._normed(x, "model.norm"), "lm_head")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.own[f"{name}.weight"])

    def _normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.own[f"{name}.weight"], self.config["rms_norm_eps"])

    def _gated(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gated = F.silu(self._linear(x, f"{name}.gate_proj")) * self._linear(x, f"{name}.up_proj")
        return self._linear(gated, f"{name}.down_proj")

    def _experts(self, x: torch.Tensor, name: str) -> torch.Tensor:
        config = self.config
        score = F.linear(x.float(), self.own[f"{name}.gate.weight"].float()).sigmoid()
        ranked = score + self.own[f"{name}.gate.expert_bias"].float()
        grouped = ranked.unflatten(1, (config["n_group"], -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(config["topk_group"], -1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, True)
        allowed = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        experts = allowed.topk(config["num_experts_per_tok"]).indices
        weights = score.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in experts.unique().tolist():
            rows, places = torch.where(experts == expert)
            made = self._gated(x[rows], f"{name}.experts.{expert}")
            out.index_add_(0, rows, made.float() * weights[rows, places, None])
        return out.to(x.dtype) + self._gated(x, f"{name}.shared_experts")


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [H, T, D]: its first channels, halves paired"""
    first, second, rest = x.split([cos.shape[1], cos.shape[1], x.shape[2] - 2 * cos.shape[1]], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
