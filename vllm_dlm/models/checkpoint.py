"""Checks that a checkpoint has every tensor of the model, in the right shape and finite. Otherwise startup fails.

vLLM considers a stacked parameter loaded as soon as one of its parts is loaded,
and exempts linear layers from its own check. Read in vLLM 0.32:
model_executor/models/utils.py (`WeightsMapper`, `AutoWeightsLoader`),
model_executor/model_loader/default_loader.py (`track_weights_loading`),
model_executor/layers/fused_moe/routed_experts.py (`RoutedExperts`).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

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
from vllm_dlm.models.quantization import neutral

logger = init_logger(__name__)

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
NAMED = 4  # maximum number of tensors named in a message
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: weights of quantized layers with one element per number, so their shapes are known
MATRICES, ONE_EACH = ("weight", "w13_weight", "w2_weight"), (*FLOATS, torch.int8, torch.float8_e4m3fn)
#: tensors of quantized layers that no kernel reads
UNREAD = ("weight_shape", "g_idx")
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

    shape: tuple[int, ...] | None  # None: layout of a quantization method, whose loader checks it
    dtype: torch.dtype  # dtype of the parameter it is loaded into
    quantized: bool = False


def of_experts(name: str, module: RoutedExperts) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The checkpoint's names and shapes for vLLM's joint parameter of all experts"""
    owner, _, joint = name.rpartition(".routed_experts.")
    stack, _, leaf = joint.partition("_")  # such as w13_weight_scale
    inner, width = module.moe_config.intermediate_size, module.moe_config.hidden_dim
    parts = ("gate_proj", "up_proj") if stack == "w13" else ("down_proj",)
    for expert in range(module.moe_config.num_logical_experts):
        for part in parts:
            yield f"{owner}.{expert}.{part}.{leaf}", (width, inner) if part == "down_proj" else (inner, width)


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
        self.quantised: set[str] = set()  # prefixes of the tensors of quantized modules
        self.came: set[str] = set()
        self.read: tuple[str, list[int]] | None = None  # name and shape of the tensor being loaded
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, RoutedExperts) and leaf.endswith("bias") and not module.moe_config.has_bias:
                continue  # GPTQ's method makes them for models that have some
            method = getattr(module, "quant_method", None)
            plain = method is None or isinstance(method, PLAIN) or leaf == "bias"
            shaped = plain or (leaf in MATRICES and parameter.dtype in ONE_EACH)
            if isinstance(module, RoutedExperts):
                expected = list(of_experts(name, module))
            else:
                names = hub_names(mapper, name)
                expected = [(own, whole_shape(module, parameter, shard) if shaped else ()) for own, shard in names]
            for own, shape in expected:
                self.wanted[own] = Wanted(shape if shaped else None, parameter.dtype, not plain)
                if not plain:
                    self.quantised.add(own[: own.rindex(".") + 1])
        self._join()
        # A checkpoint may also contain a copy of a tied head.
        tied = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in parameters]
        self.redundant = {hub_name for name in tied for hub_name, _ in hub_names(mapper, name)}

    def _join(self) -> None:
        """Joins parameters "module[part].name", which the checkpoint stores as parts of one tensor, in the order of
        rows."""
        for name in [name for name in self.wanted if "[" in name]:
            part, whole = self.wanted.pop(name), unmarked(name)
            before = self.wanted.get(whole)
            if part.shape is not None and before is not None and before.shape is not None:
                part = replace(part, shape=(before.shape[0] + part.shape[0], *part.shape[1:]))
            self.wanted[whole] = part
        self.quantised = {unmarked(module) for module in self.quantised}

    def checked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors that the model uses, checked one at a time as they are read."""
        unused = []
        for name, tensor in self._read(weights):
            if (wanted := self.wanted.get(name)) is not None:
                self._check(name, tensor, wanted)
                self.came.add(name)
                self.read = name, list(tensor.shape)
                yield name, tensor
            elif self._of_quantised(name):
                if not neutral(name, tensor):
                    raise ValueError(
                        f"{self.architecture}: {name} in the checkpoint is not part of the method in "
                        "quantization_config of config.json, which would ignore it"
                    )
            elif name not in self.redundant and DERIVED.map_name(name) is not None:
                unused.append(name)
        if unused:
            count, first = _listed(unused)
            logger.warning("%s: ignoring %s that this model does not use: %s", self.architecture, count, first)

    def refuse_missing(self) -> None:
        missing = [name for name in self.wanted if name not in self.came and not self._unread(name)]
        if missing:
            count, first = _listed(missing)
            raise ValueError(f"{self.architecture}: {count} missing from the checkpoint: {first}")

    def refused_by_loader(self, error: Exception) -> ValueError:
        """The error for a failed assertion of vLLM's loaders, which check shapes of quantized tensors by assertions"""
        assert self.read is not None, "no tensor is being loaded"
        name, shape = self.read
        reason = str(error).splitlines()
        return ValueError(
            f"{self.architecture}: {name} in the checkpoint is {shape}, which does not fit config.json and its "
            f"quantization_config{': ' + reason[0] if reason else ''}"
        )

    def _of_quantised(self, name: str) -> bool:
        return name[: name.rindex(".") + 1] in self.quantised if "." in name else False

    def _unread(self, name: str) -> bool:
        return self._of_quantised(name) and name.endswith(UNREAD)

    def _check(self, name: str, tensor: torch.Tensor, wanted: Wanted) -> None:
        if wanted.shape is not None and tuple(tensor.shape) != wanted.shape:
            raise ValueError(
                f"{self.architecture}: {name} in the checkpoint is {list(tensor.shape)}, "
                f"and by config.json it must be {list(wanted.shape)}"
            )
        if (tensor.dtype in FLOATS) != (wanted.dtype in FLOATS):
            by = "quantization_config of config.json" if wanted.quantized else "config.json"
            raise ValueError(
                f"{self.architecture}: {name} in the checkpoint is {tensor.dtype}, and by {by} it must be "
                f"{'a float' if wanted.dtype in FLOATS else wanted.dtype}"
            )
        # The minimum and maximum reveal every NaN and infinity in one read, without a copy.
        if tensor.dtype not in FLOATS or not tensor.numel():
            return
        ends = torch.stack(tensor.aminmax())
        if not ends.isfinite().all():
            raise ValueError(f"{self.architecture}: {name} in the checkpoint has values that are NaN or infinite")
        if not ends.to(wanted.dtype).isfinite().all():
            raise ValueError(
                f"{self.architecture}: {name} in the checkpoint has values up to {ends.abs().max():.3g}, "
                f"which {wanted.dtype} cannot hold; choose another dtype"
            )

    def _read(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            yield from weights
        except SafetensorError as error:
            raise unreadable(self.architecture, f"checkpoint {self.path}", error) from None


def unmarked(name: str) -> str:
    """Name in the checkpoint of the tensor or module that contains "module[part].name"."""
    return re.sub(r"\[\w+\]", "", name)


def _listed(names: list[str]) -> tuple[str, str]:
    """-> the number of tensors in words, and the first names"""
    count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
    return count, ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
