"""Page-sparse attention against dense attention, one decoding step: checked against its definition, then timed.

Score, selection and attention over the chosen pages, beside every dense kernel
that is here and the time that moving the bytes alone would take. Needs torch
(and Triton on a GPU), not vLLM; where vLLM is installed on a CPU, its own
attention kernel is one of the dense ones.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import report

try:
    import vllm_dlm.kernels  # noqa: F401
except ImportError:  # a checkout that is not installed
    import vllm_dlm

    vllm_dlm.__path__.append(str(Path(__file__).resolve().parents[1]))

from vllm_dlm.kernels.haar_pyramid import PageStatistics, store_statistics
from vllm_dlm.kernels.page_scores import naive as naive_scores
from vllm_dlm.kernels.page_scores import page_scores
from vllm_dlm.kernels.sparse_attention import naive as naive_attention
from vllm_dlm.kernels.sparse_attention import sparse_attention
from vllm_dlm.kernels.top_pages import naive as naive_top
from vllm_dlm.kernels.top_pages import physical_pages, top_pages

HEADS, KV_HEADS, DIM = 32, 8, 128
PAGE, BUDGET, LAM = 64, 2048, 0.5
SINK, RECENT = 1, 2

COLUMNS = [
    report.Column("keys", "keys"),
    report.Column("batch", "batch"),
    report.Column("dense_kernel", "fastest dense kernel"),
    report.Column("dense_ms", "dense ms", "{:.3f}"),
    report.Column("score_ms", "score ms", "{:.3f}"),
    report.Column("select_ms", "select ms", "{:.3f}"),
    report.Column("attend_ms", "attend ms", "{:.3f}"),
    report.Column("sparse_ms", "all three ms", "{:.3f}"),
    report.Column("ratio", "× dense", "{:.1f}"),
    report.Column("served_ms", "all three, vLLM's kernel attends, ms", "{:.3f}"),
    report.Column("served_ratio", "× dense", "{:.1f}"),
    report.Column("bound_ms", "byte bound ms", "{:.3f}"),
    report.Column("of_bound", "of the bound", "{:.0%}"),
    report.Column("bound_ratio", "bound: × dense", "{:.1f}"),
    report.Column("store_us", "statistics of a full page, µs", "{:.0f}"),
]


def add_arguments(parser) -> None:
    parser.add_argument("--keys", default="8192,32768,131072", help="context lengths (default 8192,32768,131072)")
    parser.add_argument("--batches", help="default 1; on a GPU 1,8,32")
    parser.add_argument("--queries", type=int, default=1, help="per request (default 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per timing (default 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-checks", action="store_true", help="time only")
    parser.add_argument("--quick", action="store_true", help="short contexts, short timings")
    parser.add_argument("--results", type=Path, default=report.RESULTS)


def run(args) -> None:
    device = torch.device(args.device)
    lengths = [2048] if args.quick else [int(n) for n in args.keys.split(",")]
    batches = [int(n) for n in (args.batches or ("1,8,32" if device.type == "cuda" else "1")).split(",")]
    seconds = 0.05 if args.quick else args.seconds
    load = report.load_average()
    checked = 0 if args.no_checks else check(device)
    bandwidth = measure_bandwidth(device, seconds)
    rows = []
    for keys in lengths:
        for batch in batches:
            if batch * keys * 2 * KV_HEADS * DIM * 2 > memory_limit(device):
                continue
            rows.append(measure(Case.random(keys, batch, args.queries, device), seconds, bandwidth))
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = report.Report(
        name="kernels-" + name.lower().replace(" ", "-"),
        title=f"Page-sparse decoding attention on {name}",
        settings={
            "shape": {"query heads": HEADS, "key heads": KV_HEADS, "head dim": DIM, "queries per request": args.queries},
            "dtype": "bfloat16", "page": PAGE, "budget_tokens": BUDGET, "sink_pages": SINK, "recent_pages": RECENT,
            "std_kind": "l2", "reduce": "max", "pages": "shuffled", "measured bytes/s": f"{bandwidth:.3g}",
            "machine": report.machine(torch.get_num_threads()) | ({"gpu": name} if device.type == "cuda" else {}),
            "versions": report.versions(), "load_average_before": load,
        },
        columns=COLUMNS,
        notes=[
            "All of one run. Medians over repetitions; a GPU is timed with events over launches in a row, caches not "
            "flushed. All three: score, select and attend together, timed as one.",
            "vLLM's kernel attends: as a server on a CPU decodes, over a table of the chosen pages in vLLM's packed cache "
            "(vllm_dlm/attention/packed.py); attend and all three beside it are the project's kernels, torch alone.",
            "Dense kernels tried: " + ", ".join(sorted({name for row in rows for name in row["dense"]})) + ".",
            "byte bound: mean and spread of all pages, then keys and values of the chosen ones, at the bandwidth that "
            "summing a large tensor reaches here, and how much of it the faster way attains; bound: × dense is the same for "
            "the bytes of all keys and values over those.",
            f"{checked} cases compared with the definitions in float64 before." if checked else "Not checked in this run.",
        ],
        rows=rows,
    )  # fmt: skip
    result.print()
    for path in result.write(args.results, plot):
        print(path)


def memory_limit(device: torch.device) -> float:
    return 0.35 * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 4e9


@dataclass
class Case:
    """B requests of equal length whose pages lie anywhere."""

    q: torch.Tensor  # [B * L, H, D]
    q_starts: torch.Tensor
    pages: torch.Tensor  # [blocks, Hkv, PAGE, 2 * D]
    page_table: torch.Tensor  # [B, N]
    kv_lens: torch.Tensor
    statistics: PageStatistics
    queries: int

    @classmethod
    def random(cls, keys: int, batch: int, queries: int, device, dtype=torch.bfloat16, std_kind="l2") -> "Case":
        generator = torch.Generator(device).manual_seed(keys + batch)
        count = -(-keys // PAGE)
        pages = torch.empty(batch * count, KV_HEADS, PAGE, 2 * DIM, dtype=dtype, device=device)
        for part in pages.split(64):
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        order = torch.randperm(batch * count, generator=generator, device=device)
        statistics = PageStatistics.empty(pages, PAGE, std_kind)
        for ids in order.split(256):
            store_statistics(pages, ids, statistics)
        q = torch.randn(batch * queries, HEADS, DIM, generator=generator, device=device).to(dtype)
        starts = torch.arange(0, batch * queries + 1, queries, device=device)
        return cls(
            q, starts, pages, order.view(batch, count), torch.full((batch,), keys, device=device), statistics, queries
        )

    def score(self, function=page_scores):
        count = torch.full_like(self.kv_lens, self.page_table.shape[1])
        return function(
            self.q, self.q_starts, self.statistics, self.page_table, count, count - RECENT, SINK, LAM, "max"
        )

    def attend(self, chosen: torch.Tensor, function=sparse_attention):
        return function(
            self.q, self.q_starts, self.pages, self.page_table, chosen, self.kv_lens, PAGE, DIM**-0.5, True
        )


def check(device: torch.device) -> int:
    """Every operation against its definition, at shapes that have partly filled pages and few of them."""
    checked = 0
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        for keys, queries, std_kind in ((1000, 1, "l2"), (500, 3, "vector"), (640, 2, "diag2"), (777, 8, "rms")):
            case = Case.random(keys, 2, queries, device, dtype, std_kind)
            here = Case(**{
                name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in vars(case).items()
            })  # fmt: skip
            here.statistics = PageStatistics(
                case.statistics.mean.cpu(), case.statistics.spread.cpu(), PAGE, std_kind
            )
            scores = case.score()
            torch.testing.assert_close(
                scores.cpu().double(), here.score(naive_scores.page_scores), atol=tolerance, rtol=tolerance
            )
            chosen = top_pages(scores, 5)
            assert torch.equal(chosen.cpu(), naive_top.top_pages(scores.cpu(), 5))
            want = here.attend(chosen.cpu(), naive_attention.sparse_attention)
            torch.testing.assert_close(case.attend(chosen).cpu(), want, atol=tolerance, rtol=tolerance)
            checked += 3
    return checked


# -- timing ------------------------------------------------------------------------------------


def timed(function, device: torch.device, seconds: float) -> float:
    """Median milliseconds of a call."""
    function()
    function()
    if device.type == "cpu":
        took, begin = [], time.perf_counter()
        while len(took) < 3 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            function()
            took.append(time.perf_counter() - start)
        return 1000 * statistics.median(took)
    took, begin = [], time.perf_counter()
    while len(took) < 3 or time.perf_counter() - begin < seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            function()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 10)
    return statistics.median(took)


def graphed(function, device: torch.device):
    """On a GPU the function as a graph, which is how a server launches it; elsewhere itself."""
    if device.type == "cpu":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes per second of reading: a sum over more than any cache holds."""
    big = torch.ones(1 << (31 if device.type == "cuda" else 28), dtype=torch.int8, device=device).view(torch.int64)
    return big.nbytes / (timed(big.sum, device, seconds) / 1000)


def measure(case: Case, seconds: float, bandwidth: float) -> dict:
    device, keys = case.q.device, int(case.kv_lens[0])
    batch, k = len(case.kv_lens), min(BUDGET // PAGE, case.page_table.shape[1])
    scores = case.score()
    chosen = top_pages(scores, k)

    def all_three():
        return case.attend(top_pages(case.score(), k))

    dense = {
        name: timed(graphed(function, device), device, seconds) for name, function in dense_kernels(case).items()
    }
    best = min(dense, key=dense.get)
    sparse = timed(graphed(all_three, device), device, seconds)
    served = (call := chosen_by_vllm(case, k)) and timed(call, device, seconds)
    element = case.pages.element_size()
    kv_bytes = batch * keys * KV_HEADS * 2 * DIM * element
    read = batch * k * PAGE * KV_HEADS * 2 * DIM * element + batch * case.page_table.shape[1] * KV_HEADS * (DIM * element + 4)
    bound = 1000 * read / bandwidth
    one_page = case.page_table[:, -1].contiguous()
    return {
        "keys": keys, "batch": batch, "dense_kernel": best, "dense_ms": dense[best], "dense": dense,
        "score_ms": timed(graphed(case.score, device), device, seconds),
        "select_ms": timed(graphed(lambda: top_pages(scores, k), device), device, seconds),
        "attend_ms": timed(graphed(lambda: case.attend(chosen), device), device, seconds),
        "sparse_ms": sparse, "ratio": dense[best] / sparse, "served_ms": served, "served_ratio": served and dense[best] / served,
        "bound_ms": bound, "of_bound": bound / min(sparse, served or sparse),
        "bound_ratio": kv_bytes / read,
        "store_us": 1000 * timed(
            graphed(lambda: store_statistics(case.pages, one_page, case.statistics), device), device, seconds
        ),
    }  # fmt: skip


# -- dense attention ---------------------------------------------------------------------------


def dense_kernels(case: Case) -> dict:
    """name -> a call that attends to all keys. Keys and values lie side by side for them, pages in order: what they
    like best."""
    batch, keys = len(case.kv_lens), int(case.kv_lens[0])
    kv = case.pages.view(batch, -1, KV_HEADS, PAGE, 2 * DIM).transpose(1, 2).flatten(2, 3)[:, :, :keys]
    k, v = (part.contiguous() for part in kv.chunk(2, -1))  # [B, Hkv, N, D]
    rows = case.q.view(batch, case.queries, KV_HEADS, -1, DIM).transpose(1, 2).flatten(2, 3)  # [B, Hkv, L * G, D]
    attention = torch.nn.functional.scaled_dot_product_attention
    by_head = case.q.view(batch, case.queries, HEADS, DIM).transpose(1, 2)
    kernels = {
        "torch SDPA, grouped heads as queries": lambda: attention(rows, k, v),
        "torch SDPA, enable_gqa": lambda: attention(by_head, k, v, enable_gqa=True),
    }
    if case.q.is_cuda:
        kernels |= cuda_kernels(case, k, v)
    elif theirs := vllm_cpu_kernel(case, kernels["torch SDPA, enable_gqa"]().transpose(1, 2).flatten(0, 1)):
        kernels["vLLM CPU attention"] = theirs
    return kernels


def vllm_packed(case: Case, page_size: int, page_table: torch.Tensor):
    """The case's keys in vLLM's own packed cache: (how to attend there, cache), None where vLLM is not."""
    try:
        from vllm_dlm.attention.packed import packed_pages
    except ImportError:
        return None
    pages = packed_pages(HEADS, KV_HEADS, DIM, case.q.dtype, page_size)
    cache = torch.zeros(page_table.numel(), KV_HEADS, page_size, 2 * DIM, dtype=case.q.dtype)
    kv = case.pages[case.page_table].transpose(2, 3).flatten(1, 2)  # [B, N, Hkv, 2 * D]
    for own, table in zip(kv, page_table, strict=True):
        slots = (table[:, None] * page_size + torch.arange(page_size)).flatten()[: len(own)]
        pages.write(*(part.contiguous() for part in own.chunk(2, -1)), cache, slots)
    return pages, cache


def vllm_cpu_kernel(case: Case, want: torch.Tensor | None):
    """All keys, in blocks of vLLM's size, laid out in order."""
    count = -(-int(case.kv_lens[0]) // 128)
    table = torch.arange(len(case.kv_lens) * count).view(-1, count)
    if (packed := vllm_packed(case, 128, table)) is None:
        return None
    pages, cache = packed
    lens, table, out = case.kv_lens.to(torch.int32), table.to(torch.int32), torch.empty_like(case.q)

    def call():
        pages.attend(case.q, cache, pages.batch([case.queries] * len(lens), lens, table), DIM**-0.5, out)
        return out

    if case.queries == 1:  # else it is causal and the other is not
        torch.testing.assert_close(call(), want, atol=3e-2, rtol=3e-2)
    return call


def chosen_by_vllm(case: Case, k: int):
    """Score, select and attend as a server on a CPU does: vLLM's kernel over a page table of the chosen pages."""
    if case.q.is_cuda or case.queries > 1 or (packed := vllm_packed(case, PAGE, case.page_table)) is None:
        return None
    pages, cache = packed

    def call():
        chosen = top_pages(case.score(), k)
        physical = physical_pages(case.page_table, chosen)
        return pages.attend_chosen(case.q, cache, pages.chosen_batch(case.kv_lens, k), physical, DIM**-0.5)

    torch.testing.assert_close(call(), case.attend(top_pages(case.score(), k)), atol=3e-2, rtol=3e-2)
    return call


def cuda_kernels(case: Case, k: torch.Tensor, v: torch.Tensor) -> dict:
    """FlashInfer, FlashAttention and xformers, those that are installed."""
    batch, keys = k.shape[0], k.shape[2]
    kernels = {}
    try:
        from flash_attn import flash_attn_with_kvcache

        q = case.q.view(batch, case.queries, HEADS, DIM)
        k_, v_ = (part.transpose(1, 2).contiguous() for part in (k, v))
        kernels["FlashAttention"] = lambda: flash_attn_with_kvcache(q, k_, v_, causal=True)
    except ImportError:
        pass
    try:
        import flashinfer

        if case.queries == 1:
            size, blocks = PAGE, keys // PAGE
            cache = torch.stack([part.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1) for part in (k, v)], 1)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(256 << 20, dtype=torch.uint8, device=k.device), "HND", use_tensor_cores=True
            )
            wrapper.plan(
                torch.arange(0, batch * blocks + 1, blocks, dtype=torch.int32, device=k.device),
                torch.arange(batch * blocks, dtype=torch.int32, device=k.device),
                torch.full((batch,), size, dtype=torch.int32, device=k.device),
                HEADS, KV_HEADS, DIM, size, q_data_type=case.q.dtype, data_type=case.q.dtype,
            )  # fmt: skip
            kernels["FlashInfer"] = lambda: wrapper.run(case.q, cache)
    except ImportError:
        pass
    try:
        from xformers.ops import memory_efficient_attention

        group = HEADS // KV_HEADS
        q5 = case.q.view(batch, case.queries, KV_HEADS, group, DIM)
        k5, v5 = (part.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, group, -1) for part in (k, v))
        kernels["xformers"] = lambda: memory_efficient_attention(q5, k5, v5)
    except ImportError:
        pass
    return kernels


def plot(axes, rows: list[dict]) -> None:
    for batch in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == batch]
        axes.plot([row["keys"] for row in own], [row["ratio"] for row in own], "o-", label=f"batch {batch}")
        axes.plot([row["keys"] for row in own], [row["bound_ratio"] for row in own], ":", color="grey")
    axes.set(xscale="log", xlabel="keys", ylabel="times faster than the fastest dense kernel (dotted: by bytes)")
    axes.legend(frameon=False)
