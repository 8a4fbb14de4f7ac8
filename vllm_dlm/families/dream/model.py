"""Dream: Qwen2's tensors with bidirectional attention, whose logits predict the next position."""

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.models.transformer import MaskedDiffusionLM


class DreamModel(MaskedDiffusionLM):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)},
    )
