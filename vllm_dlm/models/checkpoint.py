"""Checks that a checkpoint has every tensor of the model, in the right shape and finite. Otherwise startup fails.

vLLM considers a stacked parameter loaded as soon as one of its parts is loaded,
and exempts linear layers from its own check. Read in vLLM 0.32:
model_executor/models/utils.py (`WeightsMapper`, `AutoWeightsLoader`),
model_executor/model_loader/default_loader.py (`track_weights_loading`),
model_executor/layers/fused_moe/routed_experts.py (`RoutedExperts`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_dlm.models.files import unreadable

logger = init_logger(__name__)

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
NAMED = 4  # maximum number of tensors named in a message
#: derived tensors in some converted Llama checkpoints, which vLLM's loader drops, too
DERIVED = AutoWeightsLoader.REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER


def hub_names(mapper: WeightsMapper, name: str) -> list[tuple[str, int | None]]:
    """Inverse of the family's mapper: the checkpoint's names for a parameter, and the shard that each of them fills."""
    stacked = [
        (name.replace(new, old, 1), shard)
        for old, (new, shard) in mapper.orig_to_new_stacked.items()
        if f"{new}." in name
    ]
    found = []
    for part, shard in stacked or [(name, None)]:
        for old, new in reversed(mapper.orig_to_new_substr.items()):
            part = part.replace(new, old, 1)
        found.append((part, shard))
    return found


@dataclass(frozen=True)
class Wanted:
    """Expected tensor of the checkpoint, before it is split across ranks."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # dtype of the parameter it is loaded into


def of_experts(name: str, module: RoutedExperts) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The checkpoint's names and shapes for vLLM's joint parameter of all experts"""
    owner, _, leaf = name.rpartition(".routed_experts.")
    inner, width = module.moe_config.intermediate_size, module.moe_config.hidden_dim
    parts = ("gate_proj", "up_proj") if leaf.startswith("w13_") else ("down_proj",)
    for expert in range(module.moe_config.num_logical_experts):
        for part in parts:
            yield f"{owner}.{expert}.{part}.weight", (width, inner) if part == "down_proj" else (inner, width)


def whole_shape(module: nn.Module, parameter: nn.Parameter, shard: int | None) -> tuple[int, ...]:
    if isinstance(module, LinearBase):
        out = module.output_size if shard is None else module.output_sizes[shard]
        return (out, module.input_size)[: parameter.ndim]
    if isinstance(module, VocabParallelEmbedding):
        return module.org_vocab_size, module.embedding_dim
    return tuple(parameter.shape)


class Checkpoint:
    """Expected tensors of `model` under the checkpoint's names, and those loaded so far."""

    def __init__(self, model: nn.Module, mapper: WeightsMapper, architecture: str, path: str):
        self.architecture, self.path = architecture, path
        self.wanted: dict[str, Wanted] = {}
        # The storage of a quantized module depends on its method, so at least one tensor of each is required.
        self.quantised: set[str] = set()
        self.came: set[str] = set()
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            method = getattr(module, "quant_method", None)
            if isinstance(module, RoutedExperts):
                if isinstance(method, PLAIN):
                    self.wanted |= {own: Wanted(shape, parameter.dtype) for own, shape in of_experts(name, module)}
                else:
                    self.quantised.add(owner.removesuffix("routed_experts"))
                continue
            for hub_name, shard in hub_names(mapper, name):
                if method is None or isinstance(method, PLAIN) or leaf == "bias":
                    self.wanted[hub_name] = Wanted(whole_shape(module, parameter, shard), parameter.dtype)
                else:
                    self.quantised.add(hub_name.removesuffix(leaf))
        self._join()
        # A checkpoint may also contain a copy of a tied head.
        tied = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in parameters]
        self.redundant = {hub_name for name in tied for hub_name, _ in hub_names(mapper, name)}

    def _join(self) -> None:
        """Joins parameters "name[part]", which the checkpoint stores as parts of one tensor, in the order of rows."""
        for name in [name for name in self.wanted if name.endswith("]")]:
            part, whole = self.wanted.pop(name), name.partition("[")[0]
            rows = self.wanted[whole].shape[0] if whole in self.wanted else 0
            self.wanted[whole] = Wanted((rows + part.shape[0], *part.shape[1:]), part.dtype)

    def checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors that the model uses, checked one at a time as they are read."""
        unused = []
        for name, tensor in self._read(weights):
            if slot := self._slot(name):
                self._check(name, tensor, self.wanted.get(name))
                self.came.add(slot)
                yield name, tensor
            elif name not in self.redundant and DERIVED.map_name(name) is not None:
                unused.append(name)
        if unused:
            count, first = _listed(unused)
            logger.warning("%s: ignoring %s that this model does not use: %s", self.architecture, count, first)

    def refuse_missing(self) -> None:
        missing = [name for name in self.wanted if name not in self.came]
        missing += [f"{module}*" for module in sorted(self.quantised - self.came)]
        if missing:
            count, first = _listed(missing)
            raise ValueError(f"{self.architecture}: {count} missing from the checkpoint: {first}")

    def _slot(self, name: str) -> str | None:
        """The expected tensor of this name, or the quantized module that the tensor belongs to."""
        if name in self.wanted:
            return name
        parts = name.split(".")
        modules = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        return next((module for module in modules if module in self.quantised), None)

    def _check(self, name: str, tensor: torch.Tensor, wanted: Wanted | None) -> None:
        if wanted is not None and tuple(tensor.shape) != wanted.shape:
            raise ValueError(
                f"{self.architecture}: {name} in the checkpoint is {list(tensor.shape)}, "
                f"and by config.json it must be {list(wanted.shape)}"
            )
        # The minimum and maximum reveal every NaN and infinity in one read, without a copy.
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or not tensor.numel():
            return
        ends = torch.stack(tensor.aminmax())
        if not ends.isfinite().all():
            raise ValueError(f"{self.architecture}: {name} in the checkpoint has values that are NaN or infinite")
        if wanted is not None and not ends.to(wanted.dtype).isfinite().all():
            raise ValueError(
                f"{self.architecture}: {name} in the checkpoint has values up to {ends.abs().max():.3g}, "
                f"which {wanted.dtype} cannot hold; choose another dtype"
            )

    def _read(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield from weights
        except SafetensorError as error:
            raise unreadable(self.architecture, f"checkpoint {self.path}", error) from None


def _listed(names: list[str]) -> tuple[str, str]:
    """-> the number of tensors in words, and the first names"""
    count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
    return count, ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
