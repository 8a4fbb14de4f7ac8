"""Models that are measured: shapes, as a config.json for vLLM's load_format="dummy" or with random weights.

Small shapes have weights of their own where a baseline reads the same checkpoint. Two sizes of LLaDA with about 100M
parameters exist because the head weighs differently in each: with LLaDA's vocabulary a small model is mostly head,
which favours an engine that drops head rows; `llada-proportions` has the head share of LLaDA-8B.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dlm.step.counts import ModelShape

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DLM_BENCH_CACHE", ROOT / ".cache" / "checkpoints"))
DEMO = ROOT / "vllm_dlm" / "demo" / "checkpoint"
WALKER = ROOT / "examples" / "demo" / "walker"
ELEMENT = 2  # bytes of a bfloat16
ARCHITECTURES = {
    "llada": ("LLaDAModelLM", "llada"),
    "dream": ("DreamModel", "Dream"),
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "sdar": ("SDARForCausalLM", "sdar"),
    "llada2": ("LLaDA2MoeModelLM", "llada2_moe"),
    "a2d": ("A2DQwen3LMHeadModel", "a2d-qwen3"),
    "diffcoder": ("StableDiffcoderForCausalLM", "llama"),
    "fast-dllm-v2": ("Fast_dLLM_QwenForCausalLM", "Fast_dLLM_Qwen"),
    "rnd1": ("RND1", "rnd1"),
}
#: families with block-causal attention
BLOCK_CAUSAL = ("sdar", "llada2", "a2d", "diffcoder", "fast-dllm-v2")


@dataclass(frozen=True)
class Shape:
    name: str
    family: str
    model: ModelShape
    context: int = 4096  # most positions
    more: dict = field(default_factory=dict, hash=False)  # further fields of the config
    block: int = 32  # canvas block

    @property
    def layer_weights(self) -> int:
        """Matrix weights of one layer; a row costs two FLOPs for each."""
        own = self.model
        return own.hidden * own.head_dim * 2 * (own.heads + own.kv_heads) + 3 * own.hidden * own.ffn

    @property
    def head_weights(self) -> int:
        return self.model.hidden * self.model.vocabulary

    @property
    def parameters(self) -> int:
        norms = (2 * self.model.layers + 1) * self.model.hidden
        return 2 * self.head_weights + self.model.layers * self.layer_weights + norms

    @property
    def mask_id(self) -> int:
        return self.model.vocabulary - 1

    @property
    def eos_id(self) -> int:
        return self.model.vocabulary - 2

    def weight_bytes(self) -> int:
        """Bytes that a step reads: layers and head, not the embedding table."""
        return ELEMENT * (self.model.layers * self.layer_weights + self.head_weights)

    def kv_bytes(self, keys: int) -> int:
        """Bytes of that many keys and their values in all layers."""
        return self.model.layers * self.model.kv_bytes(keys, ELEMENT)

    def dense_flops(self, rows: int, steps: int = 1) -> int:
        """Every row through every layer and the head, every query against every key."""
        attention = 4 * rows * rows * self.model.heads * self.model.head_dim
        return steps * (self.model.layers * (2 * rows * self.layer_weights + attention) + 2 * rows * self.head_weights)

    def describe(self) -> dict:
        head = 2 * 512 * self.head_weights / self.dense_flops(512)
        return vars(self.model) | {
            "weight_gb": round(self.weight_bytes() / 1e9, 2),
            "parameters": self.parameters,
            "head_share_of_parameters": round(self.head_weights / self.parameters, 4),
            "head_share_of_dense_flops_at_512": round(head, 4),
        }

    def one_token_per_step(self, new: int) -> dict:
        """Options of a request"""
        if self.family in BLOCK_CAUSAL:
            block = {"dlm_block_length": self.block, "dlm_steps": self.block}
            return block | {"dlm_decoding": "low_confidence_dynamic", "dlm_threshold": "none"}
        return {"dlm_block_length": self.block, "dlm_steps": new}

    def config(self, context: int) -> dict:
        own, (architecture, model_type) = self.model, ARCHITECTURES[self.family]
        config = {"architectures": [architecture], "model_type": model_type, "vocab_size": own.vocabulary}
        config |= {"rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "eos_token_id": self.eos_id, "rope_theta": 500000.0}
        if self.family == "llada":
            config |= {"d_model": own.hidden, "n_layers": own.layers, "n_heads": own.heads, "n_kv_heads": own.kv_heads}
            config |= {"mlp_hidden_size": own.ffn, "embedding_size": own.vocabulary, "max_sequence_length": context}
            config |= {"activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms", "rope": True}
            config |= dict.fromkeys(("include_bias", "include_qkv_bias", "weight_tying", "use_cache"), False)
            config |= {"rope_full_precision": True}
        else:
            config |= {"hidden_size": own.hidden, "num_hidden_layers": own.layers, "num_attention_heads": own.heads}
            config |= {"num_key_value_heads": own.kv_heads, "intermediate_size": own.ffn, "hidden_act": "silu"}
            config |= {"max_position_embeddings": context, "tie_word_embeddings": False}
        if self.family in ("llada", "dream", "rnd1", *BLOCK_CAUSAL):
            config |= {"mask_token_id": self.mask_id, "pad_token_id": self.eos_id}
        if self.family in ("dream", "qwen2"):
            config |= {"use_sliding_window": False}
        elif self.family != "llada":
            config |= {"head_dim": own.head_dim}
        return config | self.more

    def folder(self, parent: Path, context: int | None = None) -> Path:
        """A folder with the config.json alone."""
        context = context or self.context
        folder = parent / f"{self.name}-{context}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(context), indent=1))
        return folder

    def checkpoint(self, dtype: str = "bfloat16", parent: Path | None = None) -> Path:
        """A checkpoint with random weights of a fixed seed; written if it does not exist yet."""
        from safetensors.torch import save_file

        from benchmarks.lib.loops import random_weights

        folder = (parent or CACHE) / f"{self.name}-{dtype}"
        config, done = self.config(self.context), folder / "config.json"
        if not done.exists() or json.loads(done.read_text()) != config:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(random_weights(config, dtype), folder / "model.safetensors", metadata={"format": "pt"})
            done.write_text(json.dumps(config, indent=1))  # last: it marks the folder as complete
        return folder


#: of LLaDA2.0-mini, whose layers have 256 experts of 512
EXPERTS = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 128,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "first_k_dense_replace": 1,
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000.0,
}
SDAR = {"block_size": 4, "attention_bias": False, "rope_theta": 1e6, "initializer_range": 0.05}
RND1 = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FEW_EXPERTS = EXPERTS | {"num_experts": 16, "moe_intermediate_size": 32}
LONG = 131072 + 256

SHAPES = {
    shape.name: shape
    for shape in (
        # layers, hidden, heads, kv_heads, head_dim, ffn, vocabulary
        Shape("llada-8b", "llada", ModelShape(32, 4096, 32, 32, 128, 12288, 126464), 4096 + 64),
        Shape("dream-7b", "dream", ModelShape(28, 3584, 28, 4, 128, 18944, 152064), 131072, {"rope_scaling": None}),
        Shape("sdar-8b", "sdar", ModelShape(36, 4096, 32, 8, 128, 12288, 151936), 32768, SDAR, 4),
        Shape("opdlm-8b", "a2d", ModelShape(36, 4096, 32, 8, 128, 12288, 151936), 32768, {"block_size": 4}, 4),
        Shape("stable-diffcoder-8b", "diffcoder", ModelShape(32, 4096, 32, 8, 128, 14336, 155136), 8192, block=4),
        Shape("fast-dllm-v2-7b", "fast-dllm-v2", ModelShape(28, 3584, 28, 4, 128, 18944, 152064), 32768),
        # the FFN's width is that of the 8 experts of 768 which a row passes
        Shape("rnd1-30b-a3b", "rnd1", ModelShape(48, 2048, 32, 4, 128, 6144, 151936), 32768, RND1),
        Shape("llama-3-8b", "llama", ModelShape(32, 4096, 32, 8, 128, 14336, 128256), LONG),
        Shape("qwen2.5-7b", "qwen2", ModelShape(28, 3584, 28, 4, 128, 18944, 152064), LONG),
        # small enough for a CPU
        Shape("llada-vocabulary", "llada", ModelShape(12, 384, 6, 6, 64, 1152, 126464), 6400),
        Shape("llada-proportions", "llada", ModelShape(12, 768, 12, 12, 64, 2304, 8960), 6400),
        Shape("llada-wide", "llada", ModelShape(12, 1536, 24, 24, 64, 4608, 17920), 6400),
        # two layers of it, for prompts whose full forwards take as long as many small ones
        Shape("llada-long", "llada", ModelShape(2, 768, 12, 12, 64, 2304, 8960), 16640),
        Shape("sdar-proportions", "sdar", ModelShape(12, 768, 12, 3, 64, 2304, 8960), 4096, SDAR, 4),
        Shape("llada2-mini", "llada2", ModelShape(10, 512, 8, 2, 64, 1280, 8960), 4096, EXPERTS),
        Shape("qwen2-0.5b", "qwen2", ModelShape(24, 896, 14, 2, 64, 4864, 8192), LONG),
        Shape("qwen1.5-0.5b", "qwen2", ModelShape(24, 1024, 16, 16, 64, 2816, 8192), LONG),
        Shape("qwen3-0.6b", "qwen3", ModelShape(28, 1024, 16, 8, 128, 3072, 8192), LONG),
        # toys
        Shape("toy-llada", "llada", ModelShape(2, 64, 2, 2, 32, 192, 512), 512),
        Shape("toy-long", "llada", ModelShape(2, 64, 2, 2, 32, 192, 512), 16640),
        Shape("toy-demo", "llada", ModelShape(6, 512, 8, 8, 64, 768, 1024), 2048),
        Shape("toy-dream", "dream", ModelShape(2, 64, 4, 2, 16, 128, 512), 512, {"rope_scaling": None}),
        Shape("toy-llama", "llama", ModelShape(4, 128, 4, 2, 32, 192, 512), 4096),
        Shape("toy-sdar", "sdar", ModelShape(2, 64, 2, 1, 64, 96, 512), 4096, SDAR, 4),
        Shape("toy-llada2", "llada2", ModelShape(2, 64, 2, 1, 64, 96, 512), 4096, FEW_EXPERTS),
    )
}


def shape_of_checkpoint(folder: Path) -> Shape:
    """The shape of a real checkpoint of any family that vLLM knows, for its bounds."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(folder), skip_tokenizer_init=True).create_model_config()
    text, heads = config.hf_text_config, config.hf_text_config.num_attention_heads
    model = ModelShape(
        text.num_hidden_layers,
        text.hidden_size,
        heads,
        getattr(text, "num_key_value_heads", heads),
        config.get_head_size(),
        text.intermediate_size,
        text.vocab_size,
    )
    return Shape(Path(folder).name, text.model_type, model, config.max_model_len)
