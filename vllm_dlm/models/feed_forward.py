"""The feed-forward part of a layer: a gated MLP, or a mixture of experts."""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear


def has_experts(config) -> bool:
    return bool(getattr(config, "num_experts", None))


def feed_forward(config, vllm_config: VllmConfig, prefix: str, layer: int) -> nn.Module:
    if not has_experts(config) or layer < config.dense_layers:
        return GatedMLP(config.hidden_size, config.intermediate_size, vllm_config, prefix)
    return (GroupedExperts if config.grouped_experts else Experts)(config, vllm_config, prefix)


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x)"""

    def __init__(self, width: int, inner: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        quant = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            width, [inner] * 2, bias=False, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, width, bias=False, quant_config=quant, prefix=f"{prefix}.down_proj")
        self.act = SiluAndMul()

    def forward(self, h_TE: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(h_TE)
        return self.down_proj(self.act(gate_up))[0]


class Experts(nn.Module):
    """Mixture of experts: each row passes its most probable experts, whose outputs are weighted by probability.

    Uses vLLM's kernels and sharding. Read in vLLM 0.32 and 0.33: model_executor/layers/fused_moe/layer.py and
    runner/moe_runner.py, which finds its layers in the forward context (see DenoisingRunner)."""

    def __init__(self, config, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.normalised = bool(getattr(config, "norm_topk_prob", False))
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, bias=False, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            dp_size=1,  # data-parallel replicas do not share experts: each has all of them
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_intermediate_size,
            renormalize=False,
            custom_routing_function=self.route,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, h_TE: torch.Tensor) -> torch.Tensor:
        return self.experts(hidden_states=h_TE, router_logits=self.gate(h_TE)[0])

    def route(self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool):
        """vLLM's router interface -> weights [T, topk] float32, experts [T, topk] int32. As in the references, softmax
        over all experts is computed in float32, and the weights are rounded to the dtype of the rows."""
        weights, experts = gating_output.float().softmax(-1).topk(topk, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(hidden_states.dtype).float(), experts.to(torch.int32)


class GroupedExperts(Experts):
    """Mixture of experts of LLaDA2, with its router in float32. Scores plus biases select the best groups and the best
    experts within them, whose outputs are weighted by scores alone. Shared experts process every row."""

    def __init__(self, config, vllm_config: VllmConfig, prefix: str):
        super().__init__(config, vllm_config, prefix)
        self.groups, self.best_groups, self.scale = config.n_group, config.topk_group, config.routed_scaling_factor
        self.gate = Gate(config.hidden_size, config.num_experts)
        inner = config.expert_intermediate_size * config.num_shared_experts
        self.shared_experts = GatedMLP(config.hidden_size, inner, vllm_config, f"{prefix}.shared_experts")

    def forward(self, h_TE: torch.Tensor) -> torch.Tensor:
        shared_TE = self.shared_experts(h_TE)  # before the routed experts, which may overwrite the rows
        return self.experts(hidden_states=h_TE, router_logits=self.gate(h_TE)) + shared_TE

    def route(self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool):
        score_TX = gating_output.float().sigmoid()
        ranked_TX = score_TX + self.gate.expert_bias
        grouped_TGX = ranked_TX.unflatten(1, (self.groups, -1))
        of_group_TG = grouped_TGX.topk(2, dim=-1).values.sum(-1)
        chosen = of_group_TG.topk(self.best_groups, dim=-1).indices
        others_TG = torch.ones_like(of_group_TG, dtype=torch.bool).scatter(1, chosen, value=False)
        ranked_TX = grouped_TGX.masked_fill(others_TG.unsqueeze(2), -torch.inf).flatten(1)
        experts = ranked_TX.topk(topk, dim=-1).indices
        weights = score_TX.gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale
        return weights, experts.to(torch.int32)


class Gate(nn.Module):
    """Router weights, kept in float32 for any model dtype, because rounding would change the choice."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, dtype=torch.float32), requires_grad=False)
        self.expert_bias = nn.Parameter(torch.empty(experts, dtype=torch.float32), requires_grad=False)

    def forward(self, h_TE: torch.Tensor) -> torch.Tensor:
        return F.linear(h_TE.float(), self.weight)
