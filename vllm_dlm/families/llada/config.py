"""Config class for LLaDA checkpoints from the hub."""

from vllm_dlm.families.config import DiffusionConfig
from vllm_dlm.families.llada import FAMILY


class LLaDAConfig(DiffusionConfig):
    """LLaDA has Llama's fields under OLMo's names. The attribute map provides both names."""

    family = FAMILY
    model_type = FAMILY.model_type
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self, n_heads=None, n_kv_heads=None, embedding_size=None, vocab_size=None, weight_tying=False, **kwargs
    ):
        # The embedding may be padded beyond the vocabulary; the head has the same rows.
        self.embedding_size = embedding_size
        super().__init__(vocab_size=embedding_size or vocab_size, **kwargs)
        self.n_heads, self.n_kv_heads = n_heads, n_heads if n_kv_heads is None else n_kv_heads
        self.weight_tying = weight_tying

    @property
    def vocab_field(self) -> str:
        return "embedding_size" if self.embedding_size else "vocab_size"

    implemented = {
        "block_type": "llama",
        "rope": True,
        "alibi": False,
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "block_group_size": 1,
        "rope_full_precision": True,
        "layer_norm_with_affine": True,
        "multi_query_attention": None,
        "clip_qkv": None,
    }
    width, heads, kv_heads = "d_model", "n_heads", "n_kv_heads"
    sizes = (width, "n_layers", heads, kv_heads, "mlp_hidden_size", "max_sequence_length")
    tied = "weight_tying"
