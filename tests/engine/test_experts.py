"""Experts, row by row in float64: which of them a router takes, and with which weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN
from tests.engine.drawn import drawn
from tests.engine.matrix import assert_answers_are_those_alone
from tests.engine.running import runner_of

CHECKPOINTS = GOLDEN / "checkpoints"


class Layer:
    """The experts of one layer of a checkpoint."""

    def __init__(self, folder, number: int):
        weights = load_file(folder / "model.safetensors").items()
        self.number, self.prefix = number, f"model.layers.{number}.mlp"
        self.weights = {name: weight.double() for name, weight in weights if name.startswith(self.prefix)}

    def router(self, row: torch.Tensor) -> torch.Tensor:
        return self.weights[f"{self.prefix}.gate.weight"] @ row

    def expert(self, name, row: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.weights[f"{self.prefix}.{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return down @ (F.silu(gate @ row) * (up @ row))

    def sum(self, weights: dict[int, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return sum(weight * self.expert(f"experts.{number}", row) for number, weight in weights.items())


def llada_moe(layer: Layer, row: torch.Tensor) -> torch.Tensor:
    """The most probable four, with their probabilities as they are."""
    prob = layer.router(row).softmax(0)
    return layer.sum({number: prob[number] for number in prob.argsort(descending=True)[:4].tolist()}, row)


def sdar_moe(layer: Layer, row: torch.Tensor) -> torch.Tensor:
    """The most probable three, whose probabilities add up to 1."""
    prob = layer.router(row).softmax(0)
    best = prob.argsort(descending=True)[:3].tolist()
    return layer.sum({number: prob[number] / prob[best].sum() for number in best}, row)


def llada2(layer: Layer, row: torch.Tensor) -> torch.Tensor:
    """Groups by their two best, experts by score and bias, weights by scores alone."""
    score = layer.router(row).sigmoid()
    ranked = score + layer.weights[f"{layer.prefix}.gate.expert_bias"]
    groups = sorted(range(4), key=lambda g: -sum(sorted(ranked[4 * g : 4 * g + 4].tolist())[-2:]))[:2]
    inside = [number for number in range(16) if number // 4 in groups]
    best = sorted(inside, key=lambda number: -ranked[number])[:4]
    weights = {number: 2.5 * score[number] / score[best].sum() for number in best}
    return layer.expert("shared_experts", row) + layer.sum(weights, row)


@pytest.fixture(scope="session")
def sdar_with_experts(tmp_path_factory):
    """SDAR's tiny checkpoint with experts in the place of its FFNs: there is no recorded run of one."""
    folder, path, g = tmp_path_factory.mktemp("sdar-moe"), CHECKPOINTS / "sdar-tiny", torch.Generator().manual_seed(7)
    weights = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if ".mlp." not in name}
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp"
        weights[f"{prefix}.gate.weight"] = torch.randn(8, 128, generator=g) * 0.2
        for expert in range(8):
            for part, shape in (("gate", (64, 128)), ("up", (64, 128)), ("down", (128, 64))):
                weights[f"{prefix}.experts.{expert}.{part}_proj.weight"] = torch.randn(*shape, generator=g) * 0.12
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {
        "architectures": ["SDARMoeForCausalLM"],
        "model_type": "sdar_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


STATED = {"lladamoe-tiny": llada_moe, "llada2-tiny": llada2, "sdar-moe": sdar_moe}


@pytest.mark.parametrize("name", STATED)
def test_experts_of_each_row(engines, sdar_with_experts, name):
    folder = sdar_with_experts if name == "sdar-moe" else CHECKPOINTS / name
    runner, layer = runner_of(engines(str(folder) if name == "sdar-moe" else name)), Layer(folder, 2)
    rows = torch.randn(23, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), runner.forwards():
        got = runner.model.model.layers[layer.number].feed_forward(rows.to(runner.device, copy=True)).cpu()
    wanted = torch.stack([STATED[name](layer, row) for row in rows.double()])
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)


def test_requests_of_sdar_with_experts(engines, sdar_with_experts):
    llm = engines(str(sdar_with_experts))
    assert_answers_are_those_alone(llm, drawn(llm, 12, "sdar-moe"))
