"""LLaDA-MoE: OLMoE's tensors with queries and keys normalized per head, and bidirectional attention."""

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.models.transformer import MaskedDiffusionLM


class LLaDAMoEModelLM(MaskedDiffusionLM):
    hf_to_vllm_mapper = WeightsMapper()
    packed_modules_mapping = {}
