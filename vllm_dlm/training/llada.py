"""Loads LLaDA as transformers' Llama with full attention and saves it back; the models differ only in tensor names.

`Trainer`, PEFT and every attention implementation then work as with any model.
(Dream is transformers' Qwen2 with `is_causal=False` and needs no renaming.)
"""

import json
import re
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_dlm.training.settings import KEY

#: tensors of a layer: LLaDA's name -> Llama's name
PARTS = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
ROOTS = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
PREFIX = "model.transformer."


def llama_name(name: str) -> str:
    name = name.removeprefix(PREFIX)
    if block := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{block[1]}.{PARTS[block[2]]}.weight"
    return f"{ROOTS[name.removesuffix('.weight')]}.weight"


def llama_config(given: dict) -> LlamaConfig:
    """Converts the config.json of LLaDA. `mask_token_id` and the page settings, which Llama lacks, are kept."""
    config = LlamaConfig(
        vocab_size=given.get("embedding_size") or given["vocab_size"],
        hidden_size=given["d_model"],
        intermediate_size=given["mlp_hidden_size"],
        num_hidden_layers=given["n_layers"],
        num_attention_heads=given["n_heads"],
        num_key_value_heads=given.get("n_kv_heads") or given["n_heads"],
        max_position_embeddings=given["max_sequence_length"],
        rms_norm_eps=given["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": given["rope_theta"]},
        tie_word_embeddings=given.get("weight_tying", False),
        bos_token_id=given.get("bos_token_id"),
        eos_token_id=given.get("eos_token_id"),
        pad_token_id=given.get("pad_token_id"),
        use_cache=False,
        is_causal=False,
        mask_token_id=given["mask_token_id"],
    )
    if KEY in given:
        setattr(config, KEY, given[KEY])
    return config


def load_llada(folder: str | Path, attn_implementation: str = "unique", dtype=torch.float32) -> LlamaForCausalLM:
    """Loads a checkpoint in the hub's format from a local folder."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config = llama_config(json.loads((folder / "config.json").read_text()))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {llama_name(name): tensor for name, tensor in load_file(file).items()}
    model = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=tensors, attn_implementation=attn_implementation, dtype=dtype
    )
    return turn_around(model)


def turn_around(model):
    """Makes attention bidirectional. Mask functions read `is_causal` from the config, SDPA from the modules."""
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    model.config.is_causal = False
    return model


def save_llada(model: LlamaForCausalLM, folder: str | Path, source: str | Path, dtype=torch.bfloat16) -> None:
    """Saves in the hub's format: tokenizer and config of `source`, the weights of `model`, and the page settings."""
    from safetensors.torch import save_file

    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text())
    if settings := getattr(model.config, KEY, None):
        config[KEY] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ours = model.state_dict()
    if model.config.tie_word_embeddings:
        ours.pop("lm_head.weight", None)
    back = {llama_name(name): name for name in _hub_names(config)}
    tensors = {back[name]: tensor.detach().to(dtype).contiguous() for name, tensor in ours.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _hub_names(config: dict) -> list[str]:
    blocks = [f"{PREFIX}blocks.{i}.{part}.weight" for i in range(config["n_layers"]) for part in PARTS]
    return blocks + [f"{PREFIX}{root}.weight" for root in ROOTS]
