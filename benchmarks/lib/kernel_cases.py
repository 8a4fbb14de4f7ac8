"""Cases of every kernel: what runs on a device against the definition in float64 on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.lib.kernel_case import DTYPES, KernelCase, compared, moved, word
from benchmarks.lib.page_cases import PageCase
from benchmarks.lib.step_cases import OF_STEP
from vllm_dlm.kernels.haar_pyramid import STD_KINDS

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
#: runs on some CPUs only, where tests/kernels/test_packed_attention.py compares it
ON_CPUS_ONLY = "packed_attention"


def folders() -> list[str]:
    """Every operation of GPUs, and vLLM's attention as the engine calls it"""
    operations = {path.parent.name for path in KERNELS.glob("*/dispatch.py")} - {ON_CPUS_ONLY}
    return sorted([*operations, "flash_attention"])


def implementation(kernel: str, here: torch.device) -> str:
    if kernel == "flash_attention":
        return "vllm"
    return "triton" if here.type == "cuda" and (KERNELS / kernel / "triton.py").exists() else "torch"


def cases(kernel: str, here: torch.device) -> Iterator[KernelCase]:
    """KeyError for a kernel without cases"""
    torch.manual_seed(0)
    return CASES[kernel](here)


def page_cases(here) -> Iterator[tuple[str, PageCase, float]]:
    """Several lengths with partly filled pages, one query and several, every dtype and kind of spread"""
    places = ((1000, 1), (500, 3), (640, 2), (777, 8))
    for dtype, tolerance in DTYPES.items():
        for (keys, queries), std_kind in zip(places, STD_KINDS, strict=True):
            name = f"{keys} keys, {queries} queries, {std_kind}, {word(dtype)}"
            yield name, PageCase.random(keys, 2, queries, here, dtype, std_kind), tolerance


def on_cpu(case: PageCase) -> PageCase:
    return PageCase(**{name: moved(value, "cpu") for name, value in vars(case).items()})


def page_scores(here):
    from vllm_dlm.kernels.page_scores import naive

    for name, case, tolerance in page_cases(here):
        yield KernelCase(name, case.score().cpu().double(), on_cpu(case).score(naive.page_scores), tolerance)


def top_pages(here):
    from vllm_dlm.kernels.top_pages import naive, top_pages

    for width, k in ((30, 1), (30, 12), (30, 40), (512, 32), (2048, 32), (2048, 500)):
        scores = torch.randn(3, 4, width)
        scores[0] = scores[0].round()  # ties
        scores[1, :, width // 2 :] = -torch.inf
        yield compared(f"{k} of {width}", top_pages, naive.top_pages, here, 0, scores, k)


def sparse_attention(here):
    from vllm_dlm.kernels.sparse_attention import naive
    from vllm_dlm.kernels.top_pages import top_pages

    for name, case, tolerance in page_cases(here):
        chosen = top_pages(case.score(), 5)
        want = on_cpu(case).attend(chosen.cpu(), naive.sparse_attention)
        yield KernelCase(name, case.attend(chosen).cpu(), want, tolerance)


def haar_pyramid(here):
    from vllm_dlm.kernels.haar_pyramid import PageStatistics, naive, spread_of, store_statistics

    for dtype, tolerance in DTYPES.items():
        for std_kind, page_size, dim in zip(STD_KINDS, (16, 64, 128, 32), (64, 128, 80, 64), strict=True):
            cache, ids = torch.randn(5, 2, 128, 2 * dim).to(dtype), torch.tensor([3, -1, 0, 4])
            kept = PageStatistics.empty(cache.to(here), page_size, std_kind)
            store_statistics(cache.to(here), ids.to(here), kept)
            own = ids[ids >= 0]
            ((mean, variance),) = naive.haar_pyramid(cache, own, page_size, [page_size.bit_length() - 1])
            got = torch.cat([kept.mean.cpu()[own].double(), kept.spread.cpu()[own].double()], -1)
            want = torch.cat([mean, spread_of(variance, std_kind)], -1)
            yield KernelCase(f"pages of {page_size}, {dim} channels, {std_kind}, {word(dtype)}", got, want, tolerance)


def varlen_attention(here):
    from vllm_dlm.kernels.varlen_attention import naive, varlen_attention

    for dtype, tolerance in DTYPES.items():
        for q_lens, kv_lens in (([1], [1]), ([5, 17, 1], [5, 17, 1]), ([40, 1, 7], [40, 33, 90])):
            q = torch.randn(sum(q_lens), 8, 64).to(dtype)
            k, v = (torch.randn(sum(kv_lens), 2, 64).to(dtype) for _ in range(2))
            name, inputs = f"{q_lens} queries, {word(dtype)}", (q, k, v, q_lens, kv_lens, 64**-0.5)
            yield compared(name, varlen_attention, naive.varlen_attention, here, tolerance, *inputs)


def paged_attention(here):
    from vllm_dlm.kernels.paged_attention import naive, paged_attention

    for dtype, tolerance in DTYPES.items():
        for q_lens, kv_lens in (([5, 0, 20], [33, 64, 100]), ([70, 3], [70, 200])):
            tables = list(torch.randperm(20)[: sum(-(-n // 32) for n in kv_lens)].split([-(-n // 32) for n in kv_lens]))
            q, cache = torch.randn(sum(q_lens), 8, 64).to(dtype), torch.randn(20, 2, 32, 128).to(dtype)
            name, inputs = f"{q_lens} queries, {word(dtype)}", (q, cache, tables, q_lens, kv_lens, 64**-0.5)
            yield compared(name, paged_attention, naive.paged_attention, here, tolerance, *inputs)


def delta_attention(here):
    from vllm_dlm.kernels.delta_attention import delta_attention, naive

    for dtype, tolerance in DTYPES.items():
        for count in (0, 1, 9):
            query, key = torch.randn(7, 8, 64).to(dtype), torch.randn(2, 300, 64).to(dtype)
            index, delta = torch.randperm(300)[:count], torch.randn(count, 2, 64).to(dtype)
            name, inputs = f"{count} changed, {word(dtype)}", (query, key, key[:, index], delta, 0.125)
            yield compared(name, delta_attention, naive.delta_attention, here, tolerance, *inputs)


def shadow_attention(here):
    from vllm_dlm.kernels.shadow_attention import naive, shadow_attention

    for dtype, tolerance in DTYPES.items():
        for rows, lens in (([32, 8], [70, 300]), ([128], [1])):
            starts = torch.tensor([0, *rows]).cumsum(0, dtype=torch.int32)
            q, k, v = (torch.randn(sum(rows), heads, 128).to(dtype) for heads in (8, 2, 2))
            hidden = torch.cat([torch.randint(0, n, (count,)) for count, n in zip(rows, lens, strict=True)])
            table = torch.randperm(40)[: 19 * len(lens)].view(len(lens), 19).to(torch.int32)
            inputs = [q, starts, hidden, k, v, starts, torch.randn(40, 2, 16, 256).to(dtype), table]
            inputs += [torch.tensor(lens, dtype=torch.int32), 128**-0.5]
            got = shadow_attention(*(x.to(here) if isinstance(x, torch.Tensor) else x for x in inputs), max(rows))
            yield KernelCase(f"{rows} rows, {word(dtype)}", got.cpu(), naive.shadow_attention(*inputs), tolerance)


def draft_attention(here):
    from vllm_dlm.kernels.draft_attention import draft_attention, naive

    for dtype, tolerance in DTYPES.items():
        counts, lens = [8, 3], [70, 300]
        q_counts, rows = [2 * n for n in counts], torch.cat([torch.arange(2 * n) for n in counts])
        q, k, v = (torch.randn(len(rows), heads, 64).to(dtype) for heads in (8, 2, 2))
        drafted = [torch.randperm(n)[:count] for count, n in zip(counts, lens, strict=True)]
        tables = list(torch.randperm(30)[:24].split([5, 19]))
        inputs = q, q_counts, rows, k, v, drafted, torch.randn(30, 2, 16, 128).to(dtype), tables, lens, 64**-0.5
        yield compared(
            f"{counts} drafts, {word(dtype)}", draft_attention, naive.draft_attention, here, tolerance, *inputs
        )


def wavelet_lowpass(here):
    from vllm_dlm.kernels.wavelet_lowpass import lowpass, naive

    haar, db2 = (2**-0.5,) * 2, (-0.1294095226, 0.2241438680, 0.8365163037, 0.4829629131)
    for taps, levels in ((haar, 2), (haar, 1), (db2, 2), (db2, 4)):
        name = f"{len(taps)} taps, {levels} levels"
        case = compared(name, lowpass, naive.lowpass, here, 2e-6, torch.randn(2, 96, 64), taps, levels)
        yield case._replace(got=case.got.double())


def soft_page_attention(here):
    from vllm_dlm.kernels.soft_page_attention import Gate, naive, soft_page_attention

    causal = Gate(page_size=16, budget_pages=3, recent_pages=1, temperature=0.7)
    both = Gate(page_size=16, budget_pages=3, recent_pages=1, temperature=0.7, causal=False, query_block=8)
    for name, gate, count, keys, prompt in (("causal", causal, 70, 70, 0), ("response", both, 20, 110, 90)):
        q, k, v = (torch.randn(1, heads, n, 32) for heads, n in ((4, count), (2, keys), (2, keys)))
        got = soft_page_attention(*(part.to(here) for part in (q, k, v)), gate, 0.2, prompt)
        want = naive.soft_page_attention(q.double(), k.double(), v.double(), gate, 0.2, prompt)
        yield KernelCase(name, got.cpu().double(), want, 1e-4)


CASES = {
    function.__name__: function
    for function in (
        *(page_scores, top_pages, sparse_attention, haar_pyramid, varlen_attention, paged_attention),
        *(delta_attention, shadow_attention, draft_attention, wavelet_lowpass, soft_page_attention),
        *OF_STEP,
    )
}
