"""A fused projection that was quantized as a whole splits into what its parts would be, in every layout."""

import pytest
import torch

from tests.quantization.checkpoints import METHODS
from vllm_dlm.models.quantization import FusedChannels, neutral
from vllm_dlm.models.rope import halves

HEADS, KV_HEADS, DIM, INPUTS = 4, 2, 32, 128


def channels(awq: bool = False) -> FusedChannels:
    order = halves(DIM, DIM // 2)
    first = torch.arange(HEADS + 2 * KV_HEADS).unsqueeze(1) * DIM
    q, k, _ = (first + order).split([HEADS, KV_HEADS, KV_HEADS])
    return FusedChannels((q.flatten(), k.flatten(), torch.arange((HEADS + KV_HEADS) * DIM, len(first) * DIM)), awq)


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_quantized_projection_are_quantized_parts(method):
    quantize, _, _ = METHODS[method]
    weight = torch.randn((HEADS + 2 * KV_HEADS) * DIM, INPUTS, generator=torch.Generator().manual_seed(3))
    fused = channels(awq=method == "awq")
    whole = quantize(weight).tensors
    for index, part in enumerate(fused.parts):
        for leaf, tensor in quantize(weight[part]).tensors.items():
            if not leaf.endswith("g_idx"):
                got = fused.split(leaf, whole[leaf])[index]
                assert got.dtype == tensor.dtype and torch.equal(got.float(), tensor.float()), leaf


def test_one_scale_of_a_projection_is_that_of_each_part():
    scale = torch.tensor([0.5])
    assert all(part is scale for part in channels().split("weight_scale", scale))


@pytest.mark.parametrize("block, splits", [(DIM, True), (2 * DIM, True), (DIM // 2, False), (8 * DIM, False)])
def test_scales_of_blocks_split_where_parts_are_whole_blocks(block, splits):
    """Channels change places within a head, so a block must be made of heads."""
    fused = channels()
    scale = torch.arange(fused.count // block).unsqueeze(1) + torch.zeros(4)  # [blocks, blocks of inputs]
    if not splits:
        with pytest.raises(ValueError, match=f"one scale for {block} output channels"):
            fused.split("weight_scale_inv", scale)
        return
    for part, got in zip(fused.parts, fused.split("weight_scale_inv", scale), strict=True):
        assert got.tolist() == scale[part[::block] // block].tolist()


@pytest.mark.parametrize(
    "leaf, tensor, reason",
    [
        ("weight_scale", torch.ones(100, 1), "100 output channels and must have 256"),
        ("other", torch.ones(256, 1), "cannot be split"),
        ("scales", torch.ones(256), "cannot be split"),
    ],
)
def test_what_cannot_be_split(leaf, tensor, reason):
    with pytest.raises(ValueError, match=f"^{leaf}.* {reason}"):
        channels().split(leaf, tensor)


@pytest.mark.parametrize(
    "leaf, values, wanted",
    [
        ("g_idx", [0, 0, 1, 1], True),
        ("weight_g_idx", [1, 0, 1, 0], False),
        ("weight_zero_point", [0, 0], True),
        ("weight_zero_point", [0, 3], False),
        ("bias", [0.0, -0.5], False),
    ],
)
def test_what_changes_nothing(leaf, values, wanted):
    assert neutral(leaf, torch.tensor(values)) == wanted
