"""Cases of the kernels of a denoising step; see kernel_cases.py."""

import torch

from benchmarks.lib.kernel_case import DTYPES, KernelCase, compared, word


def live_rows(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Eleven rows, some without a place in the cache, and indices of some of them, with padding"""
    place, live = torch.randperm(4 * 16)[:11], torch.arange(11)
    return {
        "cache": torch.randn(4, 2, 16, 256).to(dtype),
        "positions": torch.randint(0, 50, (11,)),
        "block": torch.where(live % 4 == 2, -1, place // 16),
        "offset": place % 16,
        "index": torch.tensor([3, 0, -1, 10, 2, 7, -1]),
    }


def rotary_write(here):
    from vllm_dlm.kernels.rotary_write import naive, rotary_write

    for dtype, tolerance in DTYPES.items():
        rows, table = live_rows(dtype), torch.randn(50, 128)
        q, k, v = torch.randn(7, 12, 128).to(dtype).split((8, 2, 2), 1)
        inputs = [q, k, v, table, rows["positions"], rows["block"], rows["offset"], rows["cache"], rows["index"]]
        there = [x.to(here, copy=True) for x in inputs]
        got, kept = rotary_write(*there), rows["index"] >= 0  # padding rows may hold anything
        want = naive.rotary_write(*inputs)
        for name, mine, theirs in zip("qk", got, want, strict=True):
            yield KernelCase(f"{name}, {word(dtype)}", mine.cpu()[kept], theirs[kept], tolerance)
        yield KernelCase(f"cache, {word(dtype)}", there[7].cpu(), inputs[7], tolerance)


def block_rows(here):
    from vllm_dlm.kernels.block_rows import naive, read_rows, read_values, write_rows

    for dtype in DTYPES:
        rows = live_rows(dtype)
        cache, *places = (rows[name] for name in ("cache", "block", "offset", "index"))
        there = [x.to(here, copy=True) for x in (cache, *places)]
        got = read_rows(there[0], 256, *there[1:])
        yield KernelCase(f"read, {word(dtype)}", got.cpu(), naive.read_rows(cache, 256, *places), 0)
        yield KernelCase(f"values, {word(dtype)}", read_values(*there).cpu(), naive.read_values(cache, *places), 0)
        values = torch.randn(7, 256).to(dtype)
        write_rows(there[0], *there[1:3], values.to(here), there[3])
        naive.write_rows(cache, *places[:2], values, places[2])
        yield KernelCase(f"write, {word(dtype)}", there[0].cpu(), cache, 0)


def lowest_rows(here):
    from vllm_dlm.kernels.lowest_rows import lowest_rows, naive

    for sizes, budgets in (((9,), (4,)), ((40, 1, 0, 150), (7, 1, 0, 149)), ((8, 5, 3), (0, 5, 6)), ((1088,), (272,))):
        starts, places = (torch.tensor([0, *counts]).cumsum(0) for counts in (sizes, budgets))
        score, forced = torch.randn(sum(sizes) + 3).round(decimals=1), torch.zeros(sum(sizes) + 3, dtype=torch.bool)
        for first, size, budget in zip(starts.tolist(), sizes, budgets, strict=False):
            forced[first + torch.randperm(size)[: min(budget, size) // 2]] = True
        total = int(places[-1]) + 2
        yield compared(f"{sizes}", lowest_rows, naive.lowest_rows, here, 0, score, forced, starts, places, total)


def row_cosine(here):
    from vllm_dlm.kernels.row_cosine import naive, row_cosine

    for dtype in DTYPES:
        for width in (96, 4096):
            new = torch.randn(9, width).to(dtype)
            old = (new + torch.randn(9, width).to(dtype)).contiguous()
            case = compared(f"{width}, {word(dtype)}", row_cosine, naive.row_cosine, here, 2e-6, new, old)
            yield case._replace(got=case.got.double())


def add_norm(here):
    from vllm_dlm.kernels.add_norm import add_norm, naive

    for dtype, tolerance in DTYPES.items():
        for width in (128, 4096):
            x, added, weight = (torch.randn(*shape).to(dtype) for shape in ((9, width), (9, width), (width,)))
            name = f"{width}, {word(dtype)}"
            yield compared(name, add_norm, naive.add_norm, here, tolerance, x, added, weight, 1e-5)


def head_statistics(here):
    from vllm_dlm.kernels.head_statistics import head_statistics, naive

    for dtype, tolerance in DTYPES.items():
        for vocabulary in (500, 126464):
            logits, ends = (torch.randn(6, vocabulary) * 3).to(dtype), torch.arange(6) % 2 == 0
            got = head_statistics(logits.to(here), 7, 3, 4, ends.to(here), ends.flip(0).to(here), True)
            want = naive.head_statistics(logits, 7, 3, 4, ends, ends.flip(0), True)
            for field, mine, theirs in zip(("token", "prob", "margin", "logsumexp", "entropy"), got, want, strict=True):
                exact = 0 if field == "token" else tolerance
                yield KernelCase(f"{field} of {vocabulary}, {word(dtype)}", mine.cpu().double(), theirs.double(), exact)


def flash_attention(here):
    """vLLM's, over contiguous keys and over pages; no cases where it does not run"""
    from vllm_dlm.kernels.paged_attention.naive import paged_attention
    from vllm_dlm.kernels.varlen_attention.naive import varlen_attention
    from vllm_dlm.step.attention import flash_attention, has_flash

    for dtype in (torch.float16, torch.bfloat16):
        if not has_flash(torch.empty(1, dtype=dtype, device=here)):
            return
        q_lens, kv_lens = [5, 32, 1], [33, 1100, 300]
        q, cache = torch.randn(sum(q_lens), 8, 128).to(dtype), torch.randn(100, 2, 16, 256).to(dtype)
        k, v = torch.randn(2, sum(kv_lens), 2, 128).to(dtype)
        table = torch.randperm(100)[: 3 * 33].view(3, 33).repeat(1, 3)[:, :69]  # pages may be read twice
        starts = [torch.tensor([0, *lens]).cumsum(0).to(here, torch.int32) for lens in (q_lens, kv_lens)]
        most = (max(q_lens), max(kv_lens), 128**-0.5)
        got = flash_attention(q.to(here), k.to(here), v.to(here), *starts, None, None, *most)
        want = varlen_attention(q, k, v, q_lens, kv_lens, 128**-0.5)
        yield KernelCase(f"contiguous, {word(dtype)}", got.cpu(), want, DTYPES[dtype])
        pages = cache.transpose(1, 2).contiguous().to(here)
        lens, there = torch.tensor(kv_lens, dtype=torch.int32, device=here), table.to(here, torch.int32)
        got = flash_attention(q.to(here), *pages.chunk(2, -1), starts[0], None, lens, there, *most)
        want = paged_attention(q, cache, list(table), q_lens, kv_lens, 128**-0.5)
        yield KernelCase(f"in pages, {word(dtype)}", got.cpu(), want, DTYPES[dtype])


OF_STEP = (rotary_write, block_rows, lowest_rows, row_cosine, add_norm, head_statistics, flash_attention)
