"""Config class for LLaDA-MoE checkpoints from the hub, which have LLaDA's model_type but other field names."""

from collections.abc import Iterator
from typing import Any

from vllm_dlm.families.config import PlainRopeConfig, is_whole
from vllm_dlm.families.llada_moe import FAMILY


class LLaDAMoEConfig(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type

    def __init__(self, mask_token_id=156895, partial_rotary_factor=1, **kwargs):
        super().__init__(**kwargs)
        # config.json lacks the mask token, which is the tokenizer's <|mask|>.
        self.mask_token_id = mask_token_id
        self.partial_rotary_factor = partial_rotary_factor

    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "expert_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
    )
    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "clip_qkv": None,
        "qk_layernorm": True,
        "partial_rotary_factor": 1,
        "rope_type": "default",
        "norm_topk_prob": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "routed_scaling_factor": 1,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
    }

    dense_layers, grouped_experts = 0, False

    @property
    def intermediate_size(self) -> int:
        """Intermediate size summed over the experts that a row passes"""
        return self.expert_intermediate_size * self.num_experts_per_tok

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        experts, chosen = self.num_experts, self.num_experts_per_tok
        yield "num_experts_per_tok", chosen <= experts, f"at most num_experts={experts}"
        frequency: Any = getattr(self, "moe_layer_freq", 1)
        every = frequency if isinstance(frequency, list) else [frequency]
        yield "moe_layer_freq", all(is_whole(layer) and layer == 1 for layer in every), "1 for every layer"
