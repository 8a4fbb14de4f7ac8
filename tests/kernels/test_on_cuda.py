"""GPU tests: the kernels of a denoising step at the sizes of LLaDA-8B against their CPU paths, both launched directly
and replayed from a CUDA graph that was captured with other contents. Skipped without a GPU."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.kernels.step_inputs import heads
from vllm_dlm.kernels.block_rows import read_rows, read_values, write_rows
from vllm_dlm.kernels.delta_attention import delta_over_pages
from vllm_dlm.kernels.head_statistics import head_statistics
from vllm_dlm.kernels.lowest_rows import lowest_rows
from vllm_dlm.kernels.rotary_write import rotary_write
from vllm_dlm.kernels.row_cosine import row_cosine, row_products
from vllm_dlm.kernels.shadow_attention import shadow_attention

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = torch.bfloat16
ROWS, LIVE, BLOCKS, BLOCK = 300, 1152, 96, 64


def places(seed, spread=BLOCK):
    """Distinct blocks and offsets of live rows, some without a place, and indices of rows, some of them padding"""
    g = torch.Generator().manual_seed(seed)
    slot = torch.randperm(BLOCKS * spread, generator=g)[:LIVE]
    block = torch.where(torch.arange(LIVE) % 10 == 3, -1, slot // spread)
    index = torch.randperm(LIVE, generator=g)[:ROWS].sort()[0]
    return block, slot % spread, torch.where(torch.arange(ROWS) > ROWS - 20, -1, index)


def cache(seed, kv_heads=32, dim=128):
    return heads(BLOCKS, kv_heads, BLOCK, 2 * dim, dtype=BF16, seed=seed)


def rotary(seed, table=torch.float32, kv_heads=32):
    block, offset, index = places(seed)
    positions = torch.randint(0, 4096, (LIVE,), generator=torch.Generator().manual_seed(seed))
    q, k, v = (heads(ROWS, count, 128, dtype=BF16, seed=seed + i) for i, count in enumerate((32, kv_heads, kv_heads)))
    angles = heads(4096, 128, dtype=table, seed=9)
    return rotary_write, q, k, v, angles, positions, block, offset, cache(seed, kv_heads), index


def features(seed):
    block, offset, index = places(seed, 12)
    return write_rows, cache(seed), block, offset, heads(ROWS, 4096, dtype=BF16, seed=seed), index


def reading(function, *width):
    def case(seed):
        block, offset, index = places(seed, 12 if width else BLOCK)
        return function, cache(seed), *width, block, offset, index

    return case


def alike(function):
    def case(seed):
        new = heads(ROWS, 4096, dtype=BF16, seed=seed)
        return function, new, new + heads(ROWS, 4096, dtype=BF16, seed=seed + 1)

    return case


def lowest(seed):
    forced = torch.rand(LIVE, generator=torch.Generator().manual_seed(seed)) < 0.02
    starts, taken = torch.tensor([0, 500, 500, 1100]), torch.tensor([0, 125, 125, 275])
    return lowest_rows, heads(LIVE, seed=seed).round(decimals=2), forced, starts, taken, 300


def head(seed, entropy=False, dtype=BF16):
    marks = heads(2, 64, seed=seed) > 0
    logits = heads(64, 126464, dtype=dtype, seed=seed) * 3
    return head_statistics, logits, 126336, 126081, 126348, marks[0], marks[1], entropy


def delta(seed, kv_heads=32, block=BLOCK, queries=(250, 40)):
    g, lens = torch.Generator().manual_seed(seed), (700, 333)
    tables = torch.randperm(BLOCKS, generator=g)[: 2 * 44].view(2, 44)
    kv = heads(BLOCKS, kv_heads, block, 256, dtype=BF16, seed=seed)
    place = torch.full((2, 704), -1)
    place[0, 100:130], place[1, 300:333:3] = torch.arange(30), torch.arange(30, 41)
    starts = torch.tensor([0, *queries]).cumsum(0)
    q, moved = heads(sum(queries), 32, 128, dtype=BF16, seed=seed), heads(64, kv_heads, 128, dtype=BF16, seed=seed)
    ints = [x.to(torch.int32) for x in (starts, tables, torch.tensor(lens), place)]
    return delta_over_pages, q, ints[0], kv, *ints[1:], moved, 128**-0.5, max(queries), max(lens)


def shadow(seed, kv_heads=32, block=BLOCK, queries=(128, 40)):
    g, lens = torch.Generator().manual_seed(seed), (700, 333)
    tables = torch.randperm(BLOCKS, generator=g)[: 2 * 44].view(2, 44).to(torch.int32)
    kv = heads(BLOCKS, kv_heads, block, 256, dtype=BF16, seed=seed)
    q, k, v = (heads(sum(queries), n, 128, dtype=BF16, seed=seed + n) for n in (32, kv_heads, kv_heads))
    hidden = torch.cat([torch.randint(0, n, (rows,), generator=g) for rows, n in zip(queries, lens, strict=True)])
    starts = torch.tensor([0, *queries]).cumsum(0, dtype=torch.int32)
    arguments = q, starts, hidden, k, v, starts, kv, tables, torch.tensor(lens, dtype=torch.int32)
    return shadow_attention, *arguments, 128**-0.5, max(queries)


CASES = {
    "rotary": rotary,
    "rotary in half precision": lambda seed: rotary(seed, BF16, 4),
    "read rows": reading(read_rows, 4096),
    "write rows": features,
    "read values": reading(read_values),
    "cosine": alike(row_cosine),
    "products": alike(row_products),
    "lowest rows": lowest,
    "head": head,
    "head with entropy": lambda seed: head(seed, True, torch.float32),
    "delta": delta,
    "delta of shared heads": lambda seed: delta(seed, 4, 16, (32, 7)),
    "shadow": shadow,
    "shadow of shared heads": lambda seed: shadow(seed, 4, 16, (32, 7)),
}
#: tolerances for results that are summed in another order, or rounded to bfloat16 at another point
TOLERANCES = dict.fromkeys(("delta", "delta of shared heads", "shadow", "shadow of shared heads"), 1e-2)
TOLERANCES |= {"products": 1e-3}
SUMS = ("cosine", "products", "head", "head with entropy", *TOLERANCES)


def moved(args):
    return tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), args)


def assert_alike(case, got, wanted):
    for x, y in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        if isinstance(x, torch.Tensor):
            tolerance = TOLERANCES.get(case, 1e-5) if case in SUMS and x.is_floating_point() else 0
            torch.testing.assert_close(x.cpu(), y, atol=tolerance, rtol=tolerance)


def cleared(case, outputs, args):
    """Outputs of padding rows are unspecified but finite, so they are cleared."""
    if not case.startswith("rotary"):
        return outputs
    return [x.masked_fill((args[-1] < 0).to(x.device)[:, None, None], 0.0) for x in outputs]


@pytest.mark.parametrize("case", CASES)
def test_launch(case):
    function, *args = CASES[case](0)
    on_gpu = moved(args)
    got, wanted = function(*on_gpu), function(*args)
    assert_alike(case, cleared(case, got, args), cleared(case, wanted, args))
    assert_alike(case, on_gpu, args)  # what was written


@pytest.mark.parametrize("case", CASES)
def test_replay_with_other_contents(case):
    function, *args = CASES[case](1)
    on_gpu = moved(CASES[case](0)[1:])
    function(*on_gpu)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = function(*on_gpu)
    for x, y in zip(on_gpu, args, strict=True):
        if isinstance(x, torch.Tensor):
            x.copy_(y)
    graph.replay()
    wanted = function(*args)
    assert_alike(case, cleared(case, got, args), cleared(case, wanted, args))
    assert_alike(case, on_gpu, args)
