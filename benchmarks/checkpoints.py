"""Random LLaDA checkpoints in the hub's form, written once into a cache folder outside git.

Two proportions of about 100M parameters, because the head weighs differently
in each: with LLaDA's own vocabulary a small model is mostly head, which
flatters an engine that drops head rows; the second has the head share of
LLaDA-8B.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

CACHE = Path(os.environ.get("DLM_BENCH_CACHE", Path(__file__).resolve().parents[1] / ".cache" / "checkpoints"))


@dataclass(frozen=True)
class Shape:
    """LLaDA-8B is width 4096, 32 layers, 32 heads, feed_forward 12288, vocabulary 126464."""

    name: str
    width: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    context: int = 6400  # the longest of the ragged prompts around 4096, 6144, and its response

    @property
    def layer_weights(self) -> int:
        """Matrix weights of a layer; a row costs two FLOPs for each."""
        return 4 * self.width**2 + 3 * self.width * self.feed_forward

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        norms = (2 * self.layers + 1) * self.width
        return 2 * self.head_weights + self.layers * self.layer_weights + norms

    @property
    def head_share(self) -> float:
        """Of all parameters; 6.5 % in LLaDA-8B."""
        return self.head_weights / self.parameters

    # The last ids are special, as in LLaDA, where they are a few hundred of 126464.
    @property
    def mask_id(self) -> int:
        return self.vocabulary - 1

    @property
    def eos_id(self) -> int:
        return self.vocabulary - 2

    def dense_flops(self, rows: int, steps: int = 1) -> int:
        """Every row through every layer and the head, every query against every key."""
        attention = 4 * rows * rows * self.width
        return steps * (self.layers * (2 * rows * self.layer_weights + attention) + 2 * rows * self.head_weights)

    def describe(self) -> dict:
        flops_512 = self.dense_flops(512)
        return asdict(self) | {
            "parameters": self.parameters,
            "head_share_of_parameters": round(self.head_share, 4),
            "head_share_of_dense_flops_at_512": round(2 * 512 * self.head_weights / flops_512, 4),
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llada-vocabulary", 384, 12, 6, 1152, 126_464),
        Shape("llada-proportions", 768, 12, 12, 2304, 8_960),
        # two layers of it, for prompts whose full forwards take as long as many small ones
        Shape("llada-long", 768, 2, 12, 2304, 8_960, context=16_640),
        Shape("smoke", 64, 2, 2, 192, 512, context=512),
        Shape("smoke-long", 64, 2, 2, 192, 512, context=16_640),
    )
}


def checkpoint(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Folder of the checkpoint; written if it is not there yet."""
    folder = CACHE / f"{shape.name}-{str(dtype).removeprefix('torch.')}-seed{seed}"
    config = hub_config(shape)
    done = folder / "config.json"
    if done.exists() and json.loads(done.read_text()) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(random_weights(shape, dtype, seed))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(shape, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": shape.eos_id}))
    done.write_text(json.dumps(config, indent=1))  # last: it marks the folder as complete
    return folder


def hub_config(shape: Shape) -> dict:
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.width,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.heads,
        "mlp_hidden_size": shape.feed_forward,
        "vocab_size": shape.vocabulary,
        "embedding_size": shape.vocabulary,
        "max_sequence_length": shape.context,
        "mask_token_id": shape.mask_id,
        "eos_token_id": shape.eos_id,
        "pad_token_id": shape.eos_id,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_theta": 500000.0,
        "rope_full_precision": True,
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "use_cache": False,
        "torch_dtype": "bfloat16",
    }


def random_weights(shape: Shape, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """LLaDA's tensor names. The deviation is small, so that bfloat16 activations stay tame."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0, 0.02, generator=generator).to(dtype)

    width, inner = shape.width, shape.feed_forward
    yield "model.transformer.wte.weight", matrix(shape.vocabulary, width)
    for layer in range(shape.layers):
        block = f"model.transformer.blocks.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            yield f"{block}.{name}.weight", matrix(width, width)
        for name in ("ff_proj", "up_proj"):
            yield f"{block}.{name}.weight", matrix(inner, width)
        yield f"{block}.ff_out.weight", matrix(width, inner)
        for name in ("attn_norm", "ff_norm"):
            yield f"{block}.{name}.weight", torch.ones(width, dtype=dtype)
    yield "model.transformer.ln_f.weight", torch.ones(width, dtype=dtype)
    yield "model.transformer.ff_out.weight", matrix(shape.vocabulary, width)


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """A word per id: nothing is learned, but detokenisation costs what it costs."""
    words = {f"w{i}": i for i in range(shape.vocabulary - 2)} | {
        "<eos>": shape.eos_id,
        "<mask>": shape.mask_id,
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
