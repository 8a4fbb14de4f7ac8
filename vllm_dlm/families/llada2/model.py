"""LLaDA2: Ling 2.0's tensors with block-causal attention."""

from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.models.rope import halves
from vllm_dlm.models.transformer import MaskedDiffusionLM

FUSED, NORMS = ".attention.query_key_value.weight", (".query_layernorm.weight", ".key_layernorm.weight")


class LLaDA2MoeModelLM(MaskedDiffusionLM):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            "model.word_embeddings.": "model.embed_tokens.",
            **{f"{FUSED}[{name}]": f".self_attn.{name}_proj.weight" for name in "qkv"},
            ".attention.dense.": ".self_attn.o_proj.",
            ".attention.query_layernorm.": ".self_attn.q_norm.",
            ".attention.key_layernorm.": ".self_attn.k_norm.",
        },
        orig_to_new_stacked={
            f"{owner}.{name}_proj": (f"{owner}.gate_up_proj", shard)
            for owner in (".mlp", ".shared_experts")
            for shard, name in enumerate(("gate", "up"))
        },
    )

    def prepared(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Splits the fused projection into queries, keys and values, and reorders channels of queries and keys as in
        `halves`. Attention does not depend on the order, because it only multiplies queries with keys."""
        config = self.config
        order = halves(config.head_dim, config.rotary_dim)
        sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        for name, tensor in weights:
            if name.endswith(FUSED):
                for part, own in zip("qkv", tensor.split(sizes), strict=True):
                    in_heads = own.unflatten(0, (-1, config.head_dim))
                    yield f"{name}[{part}]", own if part == "v" else in_heads[:, order].flatten(0, 1)
            else:
                yield name, tensor[order] if name.endswith(NORMS) else tensor
