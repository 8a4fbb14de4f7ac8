"""int8 copies of checkpoints with random weights, in the layout of compressed-tensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

#: W8A8: one scale per output channel, activations with one dynamic scale per row
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def int8(source: Path) -> Path:
    """Written next to the checkpoint if it does not exist yet; embedding and head stay as they are."""
    folder = source.with_name(f"{source.name}-int8")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": CONFIG}
    done = folder / "config.json"
    if not done.exists() or json.loads(done.read_text()) != config:
        folder.mkdir(parents=True, exist_ok=True)
        weights = load_file(source / "model.safetensors")
        for name in [name for name, tensor in weights.items() if ".blocks." in name and tensor.ndim == 2]:
            weight = weights[name].float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name], weights[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        done.write_text(json.dumps(config, indent=1))  # last: it marks the folder as complete
    return folder
