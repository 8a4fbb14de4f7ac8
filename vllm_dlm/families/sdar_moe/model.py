"""SDAR with experts: Qwen3-MoE's tensors with block-causal attention."""

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.models.transformer import MaskedDiffusionLM


class SDARMoeForCausalLM(MaskedDiffusionLM):
    hf_to_vllm_mapper = WeightsMapper()
    packed_modules_mapping = {}
