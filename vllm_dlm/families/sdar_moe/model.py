"""Qwen3-MoE's tensors, a block at a time seen from both sides."""

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.models.transformer import MaskedDiffusionLM


class SDARMoeForCausalLM(MaskedDiffusionLM):
    hf_to_vllm_mapper = WeightsMapper()
    packed_modules_mapping = {}
