"""Dense attention kernels, those that are installed, and vLLM's own over chosen pages."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.lib.page_cases import DIM, HEADS, KV_HEADS, PAGE, PageCase
from vllm_dlm.kernels.top_pages import physical_pages, top_pages


def dense_kernels(case: PageCase) -> dict:
    """name -> a call that attends to all keys, which are contiguous or in ordered pages: the best case of each."""
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


def vllm_packed(case: PageCase, page_size: int, page_table: torch.Tensor):
    """The case's keys in vLLM's packed cache: (pages, cache); None without vLLM."""
    try:
        from vllm_dlm.page_sparse.cpu_pages import packed_pages
    except ImportError:
        return None
    pages = packed_pages(HEADS, KV_HEADS, DIM, case.q.dtype, page_size)
    cache = torch.zeros(page_table.numel(), KV_HEADS, page_size, 2 * DIM, dtype=case.q.dtype)
    kv = case.pages[case.page_table].transpose(2, 3).flatten(1, 2)  # [B, N, Hkv, 2 * D]
    for own, table in zip(kv, page_table, strict=True):
        slots = (table[:, None] * page_size + torch.arange(page_size)).flatten()[: len(own)]
        pages.write(*(part.contiguous() for part in own.chunk(2, -1)), cache, slots)
    return pages, cache


def vllm_cpu_kernel(case: PageCase, want: torch.Tensor | None):
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

    if case.queries == 1:  # with more it is causal and the other is not
        torch.testing.assert_close(call(), want, atol=3e-2, rtol=3e-2)
    return call


def chosen_by_vllm(case: PageCase, k: int):
    """Score, select and attend as a server on a CPU does, with vLLM's kernel over a table of the chosen pages"""
    if case.q.is_cuda or case.queries > 1 or (packed := vllm_packed(case, PAGE, case.page_table)) is None:
        return None
    pages, cache = packed

    def call():
        chosen = top_pages(case.score(), k)
        physical = physical_pages(case.page_table, chosen)
        return pages.attend_chosen(case.q, cache, pages.chosen_batch(case.kv_lens, k), physical, DIM**-0.5)

    torch.testing.assert_close(call(), case.attend(top_pages(case.score(), k)), atol=3e-2, rtol=3e-2)
    return call


@contextmanager
def optional(name: str) -> Iterator[None]:
    """Skips a kernel that is not installed and, with a message, one that fails here."""
    try:
        yield
    except ImportError:
        pass
    except Exception as error:
        print(f"{name} does not work here: {type(error).__name__}: {str(error)[:160]}")


def cuda_kernels(case: PageCase, k: torch.Tensor, v: torch.Tensor) -> dict:
    """vLLM's FlashAttention and FlashInfer"""
    batch, keys = k.shape[0], k.shape[2]
    found, kernels = {}, {}
    with optional("vLLM's FlashAttention"):
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        version = get_flash_attn_version(head_size=DIM)
        if version is not None and keys % PAGE == 0:
            found[f"vLLM's FlashAttention {version}"] = paged(flash_attn_varlen_func, version, case, k, v)
    with optional("FlashInfer"):
        import flashinfer

        if case.queries == 1:
            size, blocks = PAGE, keys // PAGE
            cache = torch.stack([part.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1) for part in (k, v)], 1)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(256 << 20, dtype=torch.uint8, device=k.device), "HND", use_tensor_cores=True
            )
            integers = {"dtype": torch.int32, "device": k.device}
            pages = torch.arange(batch * blocks + 1, **integers)
            dtypes = {"q_data_type": case.q.dtype, "data_type": case.q.dtype}
            last = torch.full((batch,), size, **integers)
            wrapper.plan(pages[::blocks].contiguous(), pages[:-1], last, HEADS, KV_HEADS, DIM, size, **dtypes)
            found["FlashInfer"] = lambda: wrapper.run(case.q, cache)
    for name, call in found.items():
        with optional(name):
            call()  # an error inside a CUDA graph would break the stream
            kernels[name] = call
    return kernels


def paged(function, version: int, case: PageCase, k: torch.Tensor, v: torch.Tensor):
    """As a server calls it"""
    batch, keys = k.shape[0], k.shape[2]
    blocks, integers = keys // PAGE, {"dtype": torch.int32, "device": k.device}
    table = torch.arange(batch * blocks, **integers).view(batch, blocks)
    pages = [part.unflatten(2, (blocks, PAGE)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous() for part in (k, v)]
    starts = torch.arange(0, batch * case.queries + 1, case.queries, **integers)
    lens = torch.full((batch,), keys, **integers)
    sizes = {"max_seqlen_q": case.queries, "cu_seqlens_q": starts, "max_seqlen_k": keys, "seqused_k": lens}
    more = {"block_table": table, "softmax_scale": DIM**-0.5, "causal": True, "fa_version": version}
    return lambda: function(case.q, *pages, **sizes, **more)
