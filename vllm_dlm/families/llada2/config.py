"""Config class for LLaDA2 checkpoints from the hub, whose config.json leaves some values to tokenizer and code."""

from collections.abc import Iterator
from typing import Any

from vllm_dlm.families.config import PlainRopeConfig, is_number, is_whole
from vllm_dlm.families.llada2 import FAMILY


class LLaDA2Config(PlainRopeConfig):
    family = FAMILY
    model_type = FAMILY.model_type

    def __init__(
        self,
        mask_token_id=156895,
        pad_token_id=156892,
        eos_token_id=None,
        block_size=32,
        partial_rotary_factor=1.0,
        **kwargs,
    ):
        # config.json has no end-of-text token, which equals the padding token, and no mask token, which is the
        # tokenizer's <|mask|>
        eos_token_id = pad_token_id if eos_token_id is None else eos_token_id
        super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, **kwargs)
        self.mask_token_id, self.block_size = mask_token_id, block_size
        self.partial_rotary_factor = partial_rotary_factor

    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "intermediate_size",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "num_shared_experts",
    )
    implemented = {
        "hidden_act": "silu",
        "use_qkv_bias": False,
        "use_bias": False,
        "use_qk_norm": True,
        "use_sliding_window": False,
        "rope_type": "default",
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "norm_head": False,
    }
    grouped_experts = True

    @property
    def expert_intermediate_size(self) -> int:
        return self.moe_intermediate_size

    @property
    def dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @rotary_dim.setter
    def rotary_dim(self, value) -> None:
        """Ignores the value in config.json, which is redundant."""

    def own_fields(self) -> Iterator[tuple[str, bool, str]]:
        # The published code of LLaDA2.2 is not public; only ports of it are.
        missing = "LLaDA2.2's choice of experts for whole blocks, and tokens that delete and split positions"
        yield "expert_capacity", not getattr(self, "expert_capacity", None), f"left out: {missing}, are not implemented"
        dense: Any = getattr(self, "first_k_dense_replace", None)
        yield "first_k_dense_replace", is_whole(dense) and dense >= 0, "a whole number of at least 0"
        experts, groups = self.num_experts, self.n_group
        even = experts % groups == 0 and experts >= 2 * groups
        yield "n_group", even, f"a number that divides num_experts={experts} into groups of at least two"
        yield "topk_group", self.topk_group <= groups, f"at most n_group={groups}"
        most = self.topk_group * experts // groups
        yield "num_experts_per_tok", self.num_experts_per_tok <= most, f"at most {most}, those of topk_group groups"
        scale: Any = getattr(self, "routed_scaling_factor", None)
        yield "routed_scaling_factor", is_number(scale) and scale > 0, "a number above 0"
        share: Any = self.partial_rotary_factor
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        right = is_number(share) and 0 < share <= 1 and int(width * share) % 2 == 0
        yield (
            "partial_rotary_factor",
            right,
            f"a share of the {width} channels of a head that is an even number of them",
        )
        yield "block_size", is_whole(self.block_size) and self.block_size > 0, "a whole number above 0"
