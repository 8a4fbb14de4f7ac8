"""The definition: head by head and query by query, with the full matrix of logits. Differentiable, in any dtype."""

from collections.abc import Sequence

import torch

from vllm_dlm.kernels.soft_page_attention.gate import Gate


def soft_page_attention(q, k, v, gate: Gate, scale, prompt_len=0):
    """See dispatch.py"""
    batch, heads, count, _ = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group = heads // kv_heads
    out = []
    for b in range(batch):
        for h in range(kv_heads):
            queries = q[b, h * group : (h + 1) * group]  # [G, T, D]
            log_mask = page_log_mask(queries, k[b, h], gate, scale, prompt_len)  # [T, N]
            logits = queries @ k[b, h].T * scale + log_mask
            if gate.causal:
                position = torch.arange(length - count, length)
                logits = logits.masked_fill(torch.arange(length) > position[:, None], -torch.inf)
            out.append(logits.softmax(-1) @ v[b, h])
    return torch.stack(out).view(batch, heads, count, v.shape[3])


def page_log_mask(queries, keys, gate, scale, prompt_len):
    """queries [G, T, D], keys [N, D] -> log m for each query and key, [T, N]"""
    count, length, size = queries.shape[1], len(keys), gate.page_size
    first = length - count
    full = [keys[start : start + size] for start in range(0, length - size + 1, size)]
    out = queries.new_zeros(count, length)
    for positions in blocks(gate, first, length, prompt_len):
        forced, considered = must_read(gate, positions, length, prompt_len)
        free = [page for page in considered if page not in forced and page < len(full)]
        keep = max(0, gate.budget_pages - len(forced & considered))
        if len(free) <= keep:
            continue
        asking = queries[:, [position - first for position in positions]].flatten(0, 1)  # [R, D]
        scores = torch.stack([page_score(asking, full[page], gate, scale) for page in free], -1)  # [R, free]
        if gate.reduce == "softmax_sum":
            score = scores.softmax(-1).sum(0)
        else:
            score = scores.amax(0) if gate.reduce == "max" else scores.mean(0)
        order = (score.detach() if gate.stop_threshold else score).sort(descending=True)[0]
        tau = (order[keep - 1] + order[keep]) / 2 if keep else torch.inf
        if gate.temperature:
            log_mask = torch.nn.functional.logsigmoid((score - tau) / gate.temperature)
        else:
            log_mask = torch.where(score.detach() >= tau, 0.0, -torch.inf)
        for page, value in zip(free, log_mask, strict=True):
            rows = torch.zeros(count, dtype=torch.bool)
            rows[[position - first for position in positions]] = True
            columns = torch.arange(length) // size == page
            out = torch.where(rows[:, None] & columns, value, out)
    return out


def blocks(gate, first, length, prompt_len):
    """Lists of positions that choose together; positions of the prompt are in none."""
    if gate.causal:
        return [[t] for t in range(max(first, prompt_len), length) if t + 1 >= gate.min_context]
    if length < gate.min_context:
        return []
    size = gate.query_block or (length if prompt_len else gate.page_size)
    every = [range(start, min(start + size, length)) for start in range(prompt_len, length, size)]
    return [seen for block in every if (seen := [t for t in block if t >= first])]


def must_read(gate, positions, length, prompt_len):
    """-> pages that are always read, and all pages considered"""
    size, recent = gate.page_size, gate.recent_pages
    forced: Sequence[int]
    if gate.causal:
        last = positions[0] // size
        considered, forced = range(last + 1), range(last + 1 - recent, last + 1)
    elif prompt_len:
        considered = range(prompt_len // size)
        forced = range(-(-prompt_len // size) - recent, -(-prompt_len // size))
    else:
        considered = range(-(-length // size))
        forced = range(positions[0] // size - recent + 1, positions[-1] // size + recent)
        forced = [*forced, *range(length // size, -(-length // size))]  # an unfinished page has no statistics
    return {*range(gate.sink_pages), *forced} & set(considered), set(considered)


def page_score(queries, keys, gate, scale):
    """queries [R, D], a page's keys [P, D] -> [R]"""
    mean = keys.mean(0)
    variance = (keys - mean).square().mean(0)
    score = queries @ mean * scale
    if gate.std_kind == "vector":
        return score + gate.lam * scale * (queries.abs() @ variance.sqrt())
    if gate.std_kind == "diag2":
        pairs = zip(queries.tensor_split(4, -1), variance.tensor_split(4), strict=True)
        return score + gate.lam * scale**2 * sum(part.square().sum(-1) * group.mean() for part, group in pairs)
    total = variance.sum() if gate.std_kind == "l2" else variance.mean()
    return score + gate.lam * scale * queries.norm(dim=-1) * total.sqrt()
