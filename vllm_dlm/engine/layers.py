"""One transformer layer over packed rows of several policies.

Each kind of step is written down as the papers have it, as a generator: it
yields the rows it wants projected and gets them back. The driver runs all
generators of a layer in lockstep, phase by phase, so that rows of different
policies share one matrix product.

h: normalised input [T, E]; x: residual stream [T, E]; C: attention context
[T, H * D] before o_proj; F: FFN output [T, E]. Rows are those of the group.
"""

from collections.abc import Generator

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vllm_dlm.cache.blocks import Pages
from vllm_dlm.engine.canvas_attention import CanvasAttention
from vllm_dlm.engine.counts import Counts
from vllm_dlm.engine.packing import Group

PHASES = ("value", "query", "key", "output", "feed_forward")
Step = Generator[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]


class LayerStep:
    """What the generators of one layer have in common."""

    def __init__(self, index: int, last: bool, layer, pages: Pages | None, counts: Counts):
        self.index, self.last, self.layer, self.pages, self.counts = index, last, layer, pages, counts
        self.scale = layer.head_dim**-0.5
        self.context_width = layer.num_heads * layer.head_dim

    def run(self, groups: list[Group], x_TE: torch.Tensor, rope) -> list[torch.Tensor]:
        """-> the groups' rows of the residual stream after this layer"""
        h_TE = self.layer.input_layernorm(x_TE)
        steps = []
        for group in groups:
            make = dense if group.whole else {"exact_rows": exact_rows, "delta_v": delta_v}[group.reuse.attention]
            steps.append(make(self, group, x_TE[group.rows], h_TE[group.rows], [part[group.rows] for part in rope]))
        wanted = [next(step) for step in steps]
        for phase in PHASES:
            results = self._phase(phase, wanted)
            if phase == PHASES[-1]:
                return [finish(step, result) for step, result in zip(steps, results, strict=True)]
            wanted = [step.send(result) for step, result in zip(steps, results, strict=True)]

    def _phase(self, phase: str, wanted: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
        sizes = [len(inputs[0]) for inputs in wanted]
        self.counts.projected(phase, sum(sizes))
        if not any(sizes):  # not every linear kernel takes an empty product
            one = [tuple(part.new_zeros(1, *part.shape[1:]) for part in wanted[0])]
            return [self._phase(phase, one)[0][:0]] * len(wanted)
        if phase in ("query", "key"):
            hidden, *rope = (torch.cat(parts) if len(wanted) > 1 else parts[0] for parts in zip(*wanted, strict=True))
            result = getattr(self.layer, phase)(hidden, rope)
        else:
            rows = torch.cat([inputs[0] for inputs in wanted]) if len(wanted) > 1 else wanted[0][0]
            result = getattr(self.layer, PROJECTION.get(phase, phase))(rows)
        return list(result.split(sizes)) if len(wanted) > 1 else [result]

    # -- shared pieces ---------------------------------------------------------------------

    def selects(self, group: Group) -> bool:
        """Whether the group's responses see only part of their canvas in this layer."""
        return bool(group.views) and not group.views[0].sees_all(self.index)

    def attend(self, group: Group, q, k, v, rows, q_lens: list[int]) -> torch.Tensor:
        """Queries of canvas after canvas over this step's keys -> [Tq, H * D]"""
        if group.filtered and self.selects(group):
            return self._in_view(group, q, rows, q_lens)
        self.counts.attended(q_lens, group.kv_lens, read=False)
        return CanvasAttention(q_lens, group.kv_lens, self.scale)(q, k, v)

    def attend_pages(self, group: Group, q: torch.Tensor, rows, q_lens: list[int]) -> torch.Tensor:
        """Queries of canvas after canvas over the cached keys of their canvas -> [Tq, H * D]"""
        if self.selects(group):
            return self._in_view(group, q, rows, q_lens)
        self.counts.attended(q_lens, group.kv_lens, read=True)
        attend = CanvasAttention(q_lens, group.kv_lens, self.scale)
        return attend.over_pages(q, self.pages.layers[self.index], group.tables)

    def _in_view(self, group: Group, q: torch.Tensor, rows, q_lens: list[int]) -> torch.Tensor:
        """Rows of the prompt see everything, those of the response what their canvas's view shows them."""
        out, pages = torch.empty_like(q), self.pages.layers[self.index]
        for canvas, (prompt, response) in enumerate(self._parts(group, rows, q_lens)):
            length, table = group.kv_lens[canvas], group.tables[canvas]
            if (count := prompt.stop - prompt.start) > 0:
                self.counts.attended([count], [length], read=True)
                over = CanvasAttention([count], [length], self.scale).over_pages(q[prompt], pages, [table])
                out[prompt] = over.view_as(out[prompt])
            voters = group.voters[rows][response]
            view = group.views[canvas]
            out[response] = view.attend(self.index, self.pages, q[response], voters, self.scale, self.counts)
        return out.flatten(1)

    def _parts(self, group: Group, rows, q_lens: list[int]) -> list[tuple[slice, slice]]:
        """Where each canvas's queries lie, prompt and response apart."""
        if any(group.prompt_rows):
            before = group.positions[rows] < torch.tensor(group.response_starts, device=rows.device)[group.canvas[rows]]
            prompts = torch.bincount(group.canvas[rows][before], minlength=len(q_lens)).tolist()
        else:
            prompts = [0] * len(q_lens)
        parts, start = [], 0
        for count, prompt in zip(q_lens, prompts, strict=True):
            parts.append((slice(start, start + prompt), slice(start + prompt, start + count)))
            start += count
        return parts

    def add_moved(self, group: Group, q: torch.Tensor, rows, q_lens, changed: torch.Tensor, moved) -> torch.Tensor:
        """What the moved values [S, Hkv, D] of the changed rows add to each query's context -> [Tq, H * D]"""
        counts, positions = group.split_counts(changed), group.positions[changed]
        pages = self.pages.layers[self.index]
        if not self.selects(group):
            self.counts.attended(q_lens, group.kv_lens, read=True)
            attend = CanvasAttention(q_lens, group.kv_lens, self.scale)
            return attend.delta_over_pages(q, pages, group.tables, positions, moved, counts)
        out = torch.empty_like(q)
        own = zip(self._parts(group, rows, q_lens), positions.split(counts), moved.split(counts), strict=True)
        for canvas, ((prompt, response), where, values) in enumerate(own):
            length, table = group.kv_lens[canvas], group.tables[canvas]
            if (count := prompt.stop - prompt.start) > 0:
                self.counts.attended([count], [length], read=True)
                over = CanvasAttention([count], [length], self.scale)
                added = over.delta_over_pages(q[prompt], pages, [table], where, values, [len(where)])
                out[prompt] = added.view_as(out[prompt])
            voters = group.voters[rows][response]
            out[response] = group.views[canvas].delta(
                self.index, self.pages, q[response], voters, where, values, self.scale, self.counts
            )
        return out.flatten(1)

    def refresh_views(self, group: Group, k: torch.Tensor) -> None:
        """Every row's keys are new: the selections describe their prompts again."""
        for view, keys in zip(group.views, k.split(group.live_lens), strict=False):
            view.refresh(self.index, self.pages, keys[: view.prompt_len], self.counts)

    def similarity(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """Cosine of rows over all heads of all ranks, in float32: [T, …] x 2 -> [T]"""
        new, old = new.flatten(1).float(), old.flatten(1).float()
        parts = torch.stack([(new * old).sum(-1), new.square().sum(-1), old.square().sum(-1)])
        if get_tensor_model_parallel_world_size() > 1:
            parts = tensor_model_parallel_all_reduce(parts)
        product, a, b = parts
        return product / (a.sqrt().clamp_min(1e-8) * b.sqrt().clamp_min(1e-8))


PROJECTION = {"output": "attention_output"}


def finish(step: Step, result: torch.Tensor) -> torch.Tensor:
    try:
        step.send(result)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a layer step asked for more than one FFN")


def dense(at: LayerStep, group: Group, x, h, rope) -> Step:
    """Every row of the canvas through everything; keys and values are this step's own."""
    # Nobody reads the last layer's output but the head and the features: only those rows are queried there.
    rows = group.out if at.last else slice(None)
    q_lens = group.out_lens if at.last else group.live_lens
    v = yield (h,)
    q = yield (h[rows], *(part[rows] for part in rope))
    k = yield (h, *rope)
    if group.tables:
        at.pages.write_values(at.index, group.slots, v)
        at.pages.write_keys(at.index, group.slots, k)
        at.refresh_views(group, k)
    context = at.attend(group, q, k, v, group.out if at.last else everything(group), q_lens)
    output = yield (context,)
    x = x[rows] + output
    ffn = yield (x,)
    if len(group.featured):
        kept, slots = group.features_of(group.out) if at.last else (group.featured, group.feature_slots)
        sums = group.reuse.features == "sum"
        features = (output + ffn)[kept] if sums else torch.cat([context[kept], ffn[kept]], 1)
        at.pages.write_features(at.index, slots, features, features.shape[1])
    return x + ffn


def exact_rows(at: LayerStep, group: Group, x, h, rope) -> Step:
    """Some rows are recomputed, the others add what attention and FFN gave them last."""
    reuse = group.reuse
    # Policies that look at values leave the first layer whole: it is where new tokens come in.
    chooses = reuse.selects == "values" and at.index > 0
    looked_at = everything(group)
    if chooses and not reuse.transfer_ratio:
        chooses, looked_at = False, group.forced.nonzero()[:, 0]
    rows = looked_at
    v = yield (pick(h, looked_at, group),)
    if chooses:
        moved = at.similarity(v, at.pages.read_values(at.index, group.slots))
        rows = reuse.select_pre(group, moved).nonzero()[:, 0]
    q = yield (pick(h, rows, group), *(pick(part, rows, group) for part in rope))
    k = yield (pick(h, rows, group), *(pick(part, rows, group) for part in rope))
    at.pages.write_values(at.index, group.slots[looked_at], v)
    at.pages.write_keys(at.index, group.slots[rows], k)
    context = at.attend_pages(group, q, rows, group.split_counts(rows))
    output = yield (context,)
    x_rows = pick(x, rows, group) + output
    ffn = yield (x_rows,)
    if reuse.features == "none":
        return x_rows + ffn
    # write what was recomputed, then read all: rows without features are always among the recomputed
    keeps = torch.zeros_like(group.forced)
    keeps[group.featured] = True
    own = keeps[rows]
    slot = torch.cumsum(keeps, 0)[rows[own]] - 1  # index into `featured`
    width = x.shape[1]
    at.pages.write_features(at.index, group.feature_slots[slot], (output + ffn)[own], width)
    x = x.clone()
    x[group.featured] += at.pages.read_features(at.index, group.feature_slots, width, 0, width)
    x[rows[~own]] = (x_rows + ffn)[~own]
    return x


def delta_v(at: LayerStep, group: Group, x, h, rope) -> Step:
    """All rows attend; where a row is not salient only the moved values are added to its cached context."""
    reuse, split = group.reuse, at.context_width
    width = split + x.shape[1]
    if at.index == 0:
        # A context is the sum over what was visible: where that changes, it is made anew.
        group.salient = group.forced | group.changed | group.fresh
    changed = group.salient.nonzero()[:, 0]
    # What the prompt's rows become in the last layer is read by nobody.
    rows = group.read if at.last else everything(group)
    q_lens = group.split_counts(rows) if at.last else group.live_lens
    v = yield (h[changed],)
    q = yield (pick(h, rows, group), *(pick(part, rows, group) for part in rope))
    k = yield (h[changed], *(part[changed] for part in rope))
    slots = group.slots[changed]
    moved = v - at.pages.read_values(at.index, slots)
    at.pages.write_values(at.index, slots, v)
    at.pages.write_keys(at.index, slots, k)

    kept, feature_slots = group.features_of(rows)  # rows with features: where among `rows`, and where in pages
    cached = at.pages.read_features(at.index, feature_slots, width, 0, width)
    if len(kept) < len(rows):  # the others are recomputed in every layer
        cached = torch.zeros(len(rows), width, dtype=x.dtype, device=x.device).index_copy_(0, kept, cached)
    old, ffn = cached.split([split, x.shape[1]], 1)
    context = old + at.add_moved(group, q, rows, q_lens, changed, moved)
    exact = changed[torch.isin(changed, rows)] if at.last else changed
    place = torch.searchsorted(rows, exact)
    context[place] = at.attend_pages(group, q[place], exact, group.split_counts(exact))

    similarity = torch.ones(len(x), device=x.device).index_copy_(0, rows, at.similarity(context, old))
    group.salient = reuse.select_post(group, similarity) | group.fresh
    salient = group.salient[rows].nonzero()[:, 0]
    output = yield (context,)
    x = pick(x, rows, group) + output
    new = yield (x[salient],)
    ffn = ffn.index_copy(0, salient, new)
    at.pages.write_features(at.index, feature_slots, context[kept], width)
    at.pages.write_features(at.index, feature_slots, ffn[kept], width, split)
    return x + ffn


def everything(group: Group) -> torch.Tensor:
    return torch.arange(len(group.positions), device=group.positions.device)


def pick(tensor: torch.Tensor, rows: torch.Tensor, group: Group) -> torch.Tensor:
    """Rows of a tensor, without a copy when all are meant (row lists have no repeats)."""
    return tensor if len(rows) == len(group.positions) else tensor[rows]
