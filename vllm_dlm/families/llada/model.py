"""LLaDA: Llama with other tensor names and bidirectional attention."""

from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.models.transformer import MaskedDiffusionLM


class LLaDAModelLM(MaskedDiffusionLM):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            # without dots at the end, because quantization_config names modules;
            # the head must come first, because each block also has an ff_out, the down projection
            "model.transformer.ff_out": "lm_head",
            "model.transformer.wte": "model.embed_tokens",
            "model.transformer.ln_f": "model.norm",
            "model.transformer.blocks": "model.layers",
            ".attn_norm": ".input_layernorm",
            ".q_proj": ".self_attn.q_proj",
            ".k_proj": ".self_attn.k_proj",
            ".v_proj": ".self_attn.v_proj",
            ".attn_out": ".self_attn.o_proj",
            ".ff_norm": ".post_attention_layernorm",
            ".ff_proj": ".mlp.gate_proj",
            ".up_proj": ".mlp.up_proj",
            ".ff_out": ".mlp.down_proj",
        },
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)},
    )
