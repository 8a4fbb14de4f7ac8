"""The transformer shared by all families (Llama, Qwen2, Qwen3), with attention left to the engine.

A layer is a set of row-wise functions. The engine decides in each step which
rows pass which functions and which keys a query attends to.
"""

from collections.abc import Callable, Iterable
from typing import ClassVar, TypeAlias

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_dlm.kernels.add_norm import add_norm
from vllm_dlm.kernels.rotary_write import rotate
from vllm_dlm.kernels.row_cosine import row_cosine, row_products
from vllm_dlm.models.checkpoint import Checkpoint
from vllm_dlm.models.feed_forward import feed_forward
from vllm_dlm.models.joined import JoinedProjections
from vllm_dlm.models.quantization import named_errors, refuse_unsupported, spelled_out
from vllm_dlm.models.rope import RotaryTable

# (q [T, H, D], k [T, Hkv, D], v [T, Hkv, D]) -> context [T, H * D]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: normalized rows and the rows, [T, E] each, as two tensors or one [2, T, E]
Normed: TypeAlias = tuple[torch.Tensor, torch.Tensor] | torch.Tensor


class DiffusionLayer(nn.Module):
    """One transformer layer. H, Hkv: heads of this rank; E: model width; D: head width."""

    def __init__(self, config, vllm_config: VllmConfig, prefix: str, index: int = 0):
        super().__init__()
        quant = vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        if heads % ranks or kv_heads % ranks:
            raise ValueError(
                f"tensor_parallel_size: {ranks} does not divide this model's {heads} query and {kv_heads} "
                "key/value heads; choose a size that divides both"
            )
        family, self.head_dim = config.family, config.head_dim
        self.num_heads, self.num_kv_heads = heads // ranks, kv_heads // ranks

        def column(name: str, out: int, bias: bool = False):
            return ColumnParallelLinear(width, out, bias=bias, quant_config=quant, prefix=f"{prefix}.self_attn.{name}")

        self.input_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
        # Separate projections instead of vLLM's fused one, because reuse policies compute values and queries for
        # different rows.
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": column("q_proj", heads * self.head_dim, family.qkv_bias),
                "k_proj": column("k_proj", kv_heads * self.head_dim, family.qkv_bias),
                "v_proj": column("v_proj", kv_heads * self.head_dim, family.qkv_bias),
                "o_proj": RowParallelLinear(
                    heads * self.head_dim, width, bias=False, quant_config=quant, prefix=f"{prefix}.self_attn.o_proj"
                ),
            }
        )
        if family.qk_norm:
            for name in ("q_norm", "k_norm"):
                self.self_attn[name] = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, eps=config.rms_norm_eps)
        self.mlp = feed_forward(config, vllm_config, f"{prefix}.mlp", index)
        self.joined: JoinedProjections | None = None

    def join_projections(self) -> None:
        """Joins the projections of queries, keys and values into one product, if their weights allow it."""
        self.joined = JoinedProjections.of({name: self.self_attn[f"{name}_proj"] for name in "qkv"})

    def heads(self, names: str, h_TE: torch.Tensor) -> list[torch.Tensor]:
        """`names`: consecutive letters of "qkv" -> those projections of each row, not rotated, [T, heads, D] each"""
        if self.joined is None:
            parts = [self.self_attn[f"{name}_proj"](h_TE)[0] for name in names]
        else:
            parts = self.joined(names, h_TE)
        return [
            self._normed(name, part.unflatten(-1, (-1, self.head_dim))) for name, part in zip(names, parts, strict=True)
        ]

    def _normed(self, name: str, x_THD: torch.Tensor) -> torch.Tensor:
        return self.self_attn[f"{name}_norm"](x_THD) if f"{name}_norm" in self.self_attn else x_THD

    def attention_output(self, context: torch.Tensor) -> torch.Tensor:
        return self.self_attn["o_proj"](context)[0]

    def add_and_norm_input(self, x_TE: torch.Tensor, added_TE: torch.Tensor) -> Normed:
        """-> the sum normalized for this layer, and the sum"""
        return normed_sum(x_TE, added_TE, self.input_layernorm)

    def add_and_norm(self, x_TE: torch.Tensor, added_TE: torch.Tensor) -> Normed:
        """-> the sum normalized for the FFN, and the sum"""
        return normed_sum(x_TE, added_TE, self.post_attention_layernorm)

    def feed_forward(self, h_TE: torch.Tensor) -> torch.Tensor:
        """FFN output of normalized rows."""
        return self.mlp(h_TE)

    @staticmethod
    def similarity(new_TD: torch.Tensor, old_TD: torch.Tensor) -> torch.Tensor:
        """[T] cosine similarity of rows over all heads; each tensor-parallel rank has part of the heads"""
        if get_tensor_model_parallel_world_size() == 1:
            return row_cosine(new_TD, old_TD)
        product, a, b = tensor_model_parallel_all_reduce(row_products(new_TD, old_TD))
        return product / (a.sqrt().clamp_min(1e-8) * b.sqrt().clamp_min(1e-8))

    def forward(self, x_TE: torch.Tensor, rope, attend: Attend) -> torch.Tensor:
        """Computes every row completely: the exact model."""
        q, k, v = self.heads("qkv", self.input_layernorm(x_TE))
        context = attend(rotate(q, *rope), rotate(k, *rope), v)
        h_TE, x_TE = self.add_and_norm(x_TE, self.attention_output(context))
        return x_TE + self.feed_forward(h_TE)


def normed_sum(x_TE: torch.Tensor, added_TE: torch.Tensor, norm: RMSNorm) -> Normed:
    return add_norm(x_TE, added_TE, norm.weight.data, norm.variance_epsilon)


class DiffusionModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            DiffusionLayer(config, vllm_config, f"{prefix}.layers.{i}", i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rope = RotaryTable(
            config.head_dim,
            config.rope_theta,
            vllm_config.model_config.max_model_len,
            torch.float32 if config.family.rope_full_precision else vllm_config.model_config.dtype,
            getattr(config, "rotary_dim", None),
        )


class MaskedDiffusionLM(nn.Module, SupportsQuant):
    """Model class for vLLM's registry, loader and quantization. Subclasses define the family's tensor names."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    #: module of the checkpoint -> names of its parts before `hf_to_vllm_mapper` is applied
    fused_modules: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        model = vllm_config.model_config
        with named_errors(model.architecture, self.quant_config):
            self.model = DiffusionModel(config, vllm_config, maybe_prefix(prefix, "model"))
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        refuse_unsupported(self, model.architecture)
        self.checkpoint = Checkpoint(self, self.hf_to_vllm_mapper, model.architecture, model.model)
        # With dummy weights, a trainer may load real ones piece by piece, so missing tensors are allowed.
        self.starts_whole = vllm_config.load_config.load_format != "dummy"

    def _maybe_apply_model_mapping(self) -> None:
        """vLLM's hook that renames modules in the quantization config"""
        if self.quant_config is not None and not hasattr(self.quant_config, "dlm_renamed"):
            spelled_out(self.quant_config, self.fused_modules)
            super()._maybe_apply_model_mapping()
            self.quant_config.dlm_renamed = True  # for a second model with this configuration

    @property
    def packs_like_awq(self) -> bool:
        return self.quant_config is not None and "awq" in self.quant_config.get_name()

    def join_projections(self) -> None:
        """Joins queries, keys and values of every layer if its weights allow it. CPU kernels repack weights, so this is
        not possible there."""
        for layer in self.model.layers:
            layer.join_projections()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Exact forward pass of packed rows -> hidden states before the final norm, [T, E]."""
        x_TE, rope = self.embed_input_ids(input_ids), self.model.rope(positions)
        for layer in self.model.layers:
            x_TE = layer(x_TE, rope, attend)
        return x_TE

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[R, E] before the final norm -> [R, V]. The norm is applied only to rows that need logits."""
        return self.logits_processor(self.lm_head, self.model.norm(hidden_states))

    def prepared(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """Converts the checkpoint's tensors to those that `hf_to_vllm_mapper` expects"""
        return weights

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        used = self.prepared(self.checkpoint.checked(weights))
        try:
            loaded = AutoWeightsLoader(self).load_weights(used, mapper=self.hf_to_vllm_mapper)
        except (AssertionError, AttributeError, RuntimeError) as error:
            if self.quant_config is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise self.checkpoint.refused_by_loader(error) from error
        if self.starts_whole:
            self.checkpoint.refuse_missing()
        return loaded
