"""What stands behind the attention of a layer: one gated product for every row, or a few of many experts for each."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear


def has_experts(config) -> bool:
    return bool(getattr(config, "num_experts", None))


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x)"""

    def __init__(self, config, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        quant, width, inner = vllm_config.quant_config, config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            width, [inner] * 2, bias=False, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, width, bias=False, quant_config=quant, prefix=f"{prefix}.down_proj"
        )  # fmt: skip
        self.act = SiluAndMul()

    def forward(self, h_TE: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(h_TE)
        return self.down_proj(self.act(gate_up))[0]


class Experts(nn.Module):
    """Each row goes through the experts that the router finds most probable, and what they say is added up by these
    probabilities. vLLM's kernels and its sharding. Read in vLLM 0.32 and 0.33: model_executor/layers/fused_moe/, of it
    layer.py and runner/moe_runner.py (which finds its layers in the forward context, see DenoisingRunner)."""

    def __init__(self, config, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, bias=False, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            dp_size=1,  # replicas do not share their experts: each has all of them, and steps of its own
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_intermediate_size,
            renormalize=False,
            custom_routing_function=most_probable,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, h_TE: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden_states=h_TE, router_logits=self.gate(h_TE)[0])


def most_probable(hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool):
    """vLLM's interface of a router -> weights [T, topk] float32, experts [T, topk] int32. The softmax is float32's
    over all experts, and its probabilities are rounded to what the rows are made of, as the reference has it."""
    weights, experts = gating_output.float().softmax(-1).topk(topk, dim=-1)
    return weights.to(hidden_states.dtype).float(), experts.to(torch.int32)
