"""The models whose shapes are measured on a GPU, as a config.json alone: vLLM makes the weights on the device.

And what a step costs at least: its weights and cached keys read once at the
device's bandwidth, or its multiply-adds at the device's speed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_dlm.step.counts import Counts, ModelShape

ELEMENT = 2  # bytes of a weight, a key or a value: bfloat16


@dataclass(frozen=True)
class Shape:
    name: str
    family: str
    model: ModelShape
    context: int  # the most positions the model is made for

    @property
    def layer_weights(self) -> int:
        """Of all layers."""
        own = self.model
        attention = own.hidden * own.head_dim * (2 * own.heads + 2 * own.kv_heads)
        return own.layers * (attention + 3 * own.hidden * own.ffn)

    @property
    def head_weights(self) -> int:
        return self.model.hidden * self.model.vocabulary

    def weight_bytes(self) -> int:
        """Read by a step; the embedding's table is not."""
        return ELEMENT * (self.layer_weights + self.head_weights)

    def kv_bytes(self, keys: int) -> int:
        """Of so many keys and their values, in all layers."""
        return self.model.layers * self.model.kv_bytes(keys, ELEMENT)

    def config(self, context: int) -> dict:
        own = self.model
        common = {
            "vocab_size": own.vocabulary, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
            "eos_token_id": own.vocabulary - 2,
        }  # fmt: skip
        if self.family == "llada":
            return common | {
                "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": own.hidden,
                "n_layers": own.layers, "n_heads": own.heads, "n_kv_heads": own.kv_heads, "mlp_hidden_size": own.ffn,
                "embedding_size": own.vocabulary, "max_sequence_length": context,
                "mask_token_id": own.vocabulary - 1, "pad_token_id": own.vocabulary - 2, "activation_type": "silu",
                "block_type": "llama", "layer_norm_type": "rms", "rope": True, "rope_theta": 500000.0,
                "rope_full_precision": True, "include_bias": False, "include_qkv_bias": False, "weight_tying": False,
                "use_cache": False,
            }  # fmt: skip
        config = common | {
            "hidden_size": own.hidden, "num_hidden_layers": own.layers, "num_attention_heads": own.heads,
            "num_key_value_heads": own.kv_heads, "intermediate_size": own.ffn, "max_position_embeddings": context,
            "hidden_act": "silu", "rope_theta": 1000000.0, "tie_word_embeddings": False,
        }  # fmt: skip
        if self.family == "dream":
            return config | {
                "architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": own.vocabulary - 1,
                "pad_token_id": own.vocabulary - 2, "rope_scaling": None, "use_sliding_window": False,
            }  # fmt: skip
        names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
        config |= {"architectures": [names[self.family]], "model_type": self.family, "bos_token_id": None}
        return config | ({"head_dim": own.head_dim} if self.family == "llama" else {"use_sliding_window": False})

    def folder(self, parent: Path, context: int) -> Path:
        """Where its config.json lies, for vLLM's load_format="dummy"."""
        folder = parent / f"{self.name}-{context}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(context), indent=1))
        return folder

    def describe(self) -> dict:
        return vars(self.model) | {"weight_gb": round(self.weight_bytes() / 1e9, 2)}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llada-8b", "llada", ModelShape(32, 4096, 32, 32, 128, 12288, 126464), 4096 + 64),
        Shape("dream-7b", "dream", ModelShape(28, 3584, 28, 4, 128, 18944, 152064), 131072),
        Shape("llama-3-8b", "llama", ModelShape(32, 4096, 32, 8, 128, 14336, 128256), 131072 + 256),
        Shape("qwen2.5-7b", "qwen2", ModelShape(28, 3584, 28, 4, 128, 18944, 152064), 131072 + 256),
        Shape("toy-llada", "llada", ModelShape(2, 64, 2, 2, 32, 192, 512), 512),
        Shape("toy-demo", "llada", ModelShape(6, 512, 8, 8, 64, 768, 1024), 2048),
        Shape("toy-dream", "dream", ModelShape(2, 64, 4, 2, 16, 128, 512), 512),
        Shape("toy-llama", "llama", ModelShape(4, 128, 4, 2, 32, 192, 512), 4096),
    )
}


class Peaks(NamedTuple):
    """What the device reaches at most, of its datasheet where that is known, else measured."""

    bytes_per_s: float
    flops_per_s: float


class Bound(NamedTuple):
    ms: float
    by: str  # what takes longest: "bytes" or "FLOPs"


def bound(bytes_read: float, flops: float, peaks: Peaks) -> Bound:
    moving, computing = 1e3 * bytes_read / peaks.bytes_per_s, 1e3 * flops / peaks.flops_per_s
    return Bound(moving, "bytes") if moving >= computing else Bound(computing, "FLOPs")


def denoising_bound(shape: Shape, counts: Counts, peaks: Peaks) -> Bound:
    """Of a step that did what was counted in it (`keys_read` is summed over layers)."""
    read = shape.weight_bytes() + shape.model.kv_bytes(counts.keys_read, ELEMENT)
    return bound(read, 2 * shape.model.macs(counts), peaks)


class Reading(NamedTuple):
    """What a decoding step with chosen pages reads of each request, in the layers that choose."""

    keys: int
    page_size: int
    choosing: int  # layers; the others read everything


def decoding_bound(shape: Shape, context: int, requests: int, reading: Reading | None, peaks: Peaks) -> Bound:
    """One token of each request after `context` others. The summaries of all pages are read to choose: a mean and
    one number per key head."""
    own = shape.model
    choosing, keys = (reading.choosing, min(reading.keys, context)) if reading else (0, context)
    each = (own.layers - choosing) * own.kv_bytes(context, ELEMENT) + choosing * own.kv_bytes(keys, ELEMENT)
    if reading:
        each += choosing * -(-context // reading.page_size) * own.kv_heads * (own.head_dim * ELEMENT + 4)
    seen = (own.layers - choosing) * context + choosing * keys
    flops = 2 * requests * (shape.layer_weights + shape.head_weights + 2 * own.heads * own.head_dim * seen)
    return bound(shape.weight_bytes() + requests * each, flops, peaks)


def in_order(rows: list[dict], *fields: str) -> list[dict]:
    """As the shapes are, then by these fields; cells without a time last."""
    shapes = list(SHAPES)

    def place(row: dict) -> tuple:
        if "ms_per_step" not in row:
            return (len(shapes),)
        return shapes.index(row["shape"]), *(row[field] for field in fields)

    return sorted(rows, key=place)


def panels(figure, rows: list[dict]) -> Iterator[tuple[Any, str, list[dict]]]:
    """(axes, shape, its rows that have a time), one under the other; nothing where none has."""
    measured = [row for row in rows if "ms_per_step" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in measured))
    if shapes:
        for axes, shape in zip(figure.subplots(len(shapes), 1, squeeze=False)[:, 0], shapes, strict=True):
            yield axes, shape, [row for row in measured if row["shape"] == shape]
