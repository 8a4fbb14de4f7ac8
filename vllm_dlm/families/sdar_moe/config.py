"""Config class for SDAR checkpoints with experts from the hub: Qwen3-MoE's fields and `block_size`."""

from collections.abc import Iterator

from vllm_dlm.families.config import PlainRopeConfig
from vllm_dlm.families.sdar.config import SDARConfig
from vllm_dlm.families.sdar_moe import FAMILY


class Qwen3MoeConfig(PlainRopeConfig):
    """Qwen3-MoE's fields"""

    sizes = (*PlainRopeConfig.sizes, "moe_intermediate_size", "num_experts", "num_experts_per_tok")
    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_type": "default",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    dense_layers, grouped_experts = 0, False

    @property
    def expert_intermediate_size(self) -> int:
        return self.moe_intermediate_size

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        yield from super().own_fields()
        experts, chosen = self.num_experts, self.num_experts_per_tok
        yield "num_experts_per_tok", chosen <= experts, f"at most num_experts={experts}"
        normalised = getattr(self, "norm_topk_prob", False)
        yield "norm_topk_prob", normalised in (True, False, None), "true or false"


class SDARMoeConfig(Qwen3MoeConfig, SDARConfig):
    family = FAMILY
    model_type = FAMILY.model_type
    implemented = SDARConfig.implemented | Qwen3MoeConfig.implemented
