"""LLaDA2: Ling 2.0's tensors with block-causal attention."""

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.models.quantization import FusedChannels
from vllm_dlm.models.rope import halves
from vllm_dlm.models.transformer import MaskedDiffusionLM

FUSED, NORMS = ".attention.query_key_value", (".query_layernorm.weight", ".key_layernorm.weight")


class LLaDA2MoeModelLM(MaskedDiffusionLM):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            "model.word_embeddings": "model.embed_tokens",
            **{f"{FUSED}[{name}]": f".self_attn.{name}_proj" for name in "qkv"},
            ".attention.dense": ".self_attn.o_proj",
            ".attention.query_layernorm": ".self_attn.q_norm",
            ".attention.key_layernorm": ".self_attn.k_norm",
        },
        orig_to_new_stacked={
            f"{owner}.{name}_proj": (f"{owner}.gate_up_proj", shard)
            for owner in (".mlp", ".shared_experts")
            for shard, name in enumerate(("gate", "up"))
        },
    )
    fused_modules = {FUSED: [f"{FUSED}[{name}]" for name in "qkv"]}

    def prepared(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Splits the fused projection into queries, keys and values, and reorders channels of queries and keys as in
        `halves`. Attention does not depend on the order, because it only multiplies queries with keys."""
        config = self.config
        order = halves(config.head_dim, config.rotary_dim)  # [D]
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        first = torch.arange(heads + 2 * kv_heads).unsqueeze(1) * config.head_dim  # [heads, 1]
        q, k, _ = (first + order).split([heads, kv_heads, kv_heads])
        in_order = first[-kv_heads:] + torch.arange(config.head_dim)
        fused = FusedChannels((q.flatten(), k.flatten(), in_order.flatten()), self.packs_like_awq)
        for name, tensor in weights:
            owner, is_fused, leaf = name.partition(f"{FUSED}.")
            if is_fused:
                try:
                    parts = fused.split(leaf, tensor)
                except ValueError as error:
                    raise ValueError(f"{self.checkpoint.architecture}: {name}: {error}") from None
                for part, own in zip("qkv", parts, strict=True):
                    yield f"{owner}{FUSED}[{part}].{leaf}", own
            else:
                yield name, tensor[order] if name.endswith(NORMS) else tensor
