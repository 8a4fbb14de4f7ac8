"""The canvases of a group choose and attend together: as each would alone, by as many launches however many there are,
and without one that has to wait for the device."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.engine import pretended_gpu
from tests.engine.matrix import small
from vllm_dlm.cache.blocks import KVBlocks, Slots
from vllm_dlm.canvas.selected_keys import ChoicePool, SelectedKeys
from vllm_dlm.kernels.page_scores import torch as scores
from vllm_dlm.kernels.sparse_attention import torch as attention
from vllm_dlm.kernels.top_pages import torch as top
from vllm_dlm.methods import methods
from vllm_dlm.options import server_options
from vllm_dlm.plugins.reuse.flow import Rows
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.selection import ResponseQueries
from vllm_dlm.step.selection_packing import group_selection

KV_HEADS, DIM, BLOCK = 2, 16, 32
#: response and live rows of each canvas
RESPONSE, LIVE = 24, 9
#: what Triton has kernels for: a launch each, whatever the CPU does instead
KERNELS = [
    (scores, "page_scores"),
    (scores, "half_scores"),
    (top, "top_pages"),
    (top, "store_top_pages"),
    (top, "unless_alike"),
    (attention, "sparse_attention"),
    (attention, "sparse_delta"),
]
#: operators that wait for the device, or whose results are as large as it says
WAITING = {"nonzero", "_local_scalar_dense", "item", "masked_select", "bincount", "lift_fresh", "equal", "is_nonzero"}


def quest():
    path = Path(__file__).parents[1] / "external" / "methods" / "quest_pages.py"
    spec = importlib.util.spec_from_file_location("quest_pages_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Quest


def selections():
    found = {}
    for name, method in methods("selection").items():
        if method.sparse:
            for preset in ("", *(f"/{preset}" for preset in method.presets)):
                fields = {key: value for key, value in small("selection", name).items() if key != "name"}
                found[name + preset] = server_options(
                    {"selection": {"name": name + preset} | fields}, "random"
                ).selection
    pages = {"page_size": 16, "budget_tokens": 96, "min_context": 0, "dense_layers": ()}
    unique, wave = methods("selection")["unique"], methods("selection")["wavefilter"]
    return found | {
        "unique": unique(**pages),
        "quest": quest()(**pages),
        "unique, by channel": unique(**pages, std_kind="vector", reduce="softmax_sum"),
        "unique, held": unique(**pages, select_every=3),
        "wavefilter, three scales": wave(
            min_prompt=0, levels=3, proportions=0.6, detail_lambda=0.5, head_mode="shared"
        ),
        "wavefilter, db2": wave(min_prompt=0, wavelet="db2", reselect="drift:0.9"),
    }


SELECTIONS = selections()


class Canvases:
    """Some whose prompts are described, by the lengths of those."""

    def __init__(self, selection, prompt_lens):
        g = torch.Generator().manual_seed(0)
        lengths = [n + RESPONSE for n in prompt_lens]
        blocks = [-(-n // BLOCK) for n in lengths]
        summaries = [-(-selection.prompt_units(n).summaries // BLOCK) for n in prompt_lens]
        order = torch.randperm(sum(blocks) + sum(summaries), generator=g)
        tables = order.split([size for pair in zip(blocks, summaries, strict=True) for size in pair])
        self.cache = KVBlocks([torch.full((len(order), KV_HEADS, BLOCK, 2 * DIM), torch.nan)])
        pool = ChoicePool()
        self.views = [
            SelectedKeys(selection, n, n + RESPONSE, BLOCK, kv.numpy(), own.numpy(), False, pool)
            for n, kv, own in zip(prompt_lens, tables[::2], tables[1::2], strict=True)
        ]
        keys = []
        for n, table in zip(lengths, tables[::2], strict=True):
            # of the same canvas the same, whoever else is there
            own = torch.Generator().manual_seed(n)
            kv, where = torch.randn(n, KV_HEADS, 2 * DIM, generator=own), torch.arange(n)
            kv += 2 * torch.randn(n // 8 + 1, KV_HEADS, 2 * DIM, generator=own).repeat_interleave(8, 0)[:n]
            slots = Slots(table[where // BLOCK], where % BLOCK)
            self.cache.write_plain(0, slots, *kv.split(DIM, -1))
            keys.append(kv[..., :DIM])
        whole = group_selection(self.views, lengths, prompt_lens, True, torch.from_numpy)
        whole.refresh(0, self.cache, torch.cat(keys), Counts())

    def step(self, number: int):
        """The next step of all -> what a layer asks its group"""
        for view in self.views:
            view.step_begins()
        g = [torch.Generator().manual_seed(view.length + 1000 * (number // 2)) for view in self.views]
        q = torch.cat([torch.randn(LIVE, 2 * KV_HEADS, DIM, generator=own) for own in g])
        # who votes differs; of every second canvas nobody does, so that all do
        voters = torch.cat([torch.rand(LIVE, generator=own) < (own.initial_seed() % 2) / 2 for own in g])
        group = group_selection(self.views, [LIVE] * len(g), [0] * len(g), False, torch.from_numpy)
        rows = Rows(None, [LIVE] * len(g))
        return group, ResponseQueries(0, self.cache, q, rows, voters, 0.3, Counts())


PROMPTS = [203, 296, 331, 250]


@pytest.mark.parametrize("name", SELECTIONS)
def test_each_canvas_sees_what_it_sees_alone(name):
    selection = SELECTIONS[name]
    together, alone = Canvases(selection, PROMPTS), [Canvases(selection, [n]) for n in PROMPTS]
    chose = []
    for number in range(4):
        group, asked = together.step(number)
        units, out = group.units(group.visible(asked)), group.attend(asked)
        for i, canvas in enumerate(alone):
            own, wants = canvas.step(number)
            want = own.units(own.visible(wants))[0]
            got = units[i][units[i] >= 0].view(KV_HEADS, -1)
            assert torch.equal(got, want) and torch.equal(got, got.sort(-1)[0])
            part = slice(LIVE * i, LIVE * (i + 1))
            torch.testing.assert_close(out[part], own.attend(wants), atol=1e-6, rtol=1e-5)
        chose.append(units)
        assert group.keys[0].visible < group.keys[0].length
    assert not torch.equal(chose[0], chose[3]) or "held" in name


class Launches(TorchDispatchMode):
    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for module, name in KERNELS:
            monkeypatch.setattr(module, name, self.kernel(name, getattr(module, name)))

    def kernel(self, name, function):
        def launched(*args):
            self.found.append(name)
            found = self.found.copy()
            with _disable_current_modes():
                result = function(*args)
            self.found[:] = found  # one may be made of others here
            return result

        return launched

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._overloadpacket.__name__
        assert name not in WAITING and "unique" not in name, f"{name} waits for the device"
        if name.startswith("index"):
            indices = [i for part in args for i in (part if isinstance(part, list | tuple) else [part])]
            assert not any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices[1:2]), "boolean index"
        if not operator.is_view and not name.startswith("empty"):
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


def launches(selection, prompts, monkeypatch, step=3, delta=False):
    """Of one layer in a step, choosing and attending."""
    canvases = Canvases(selection, prompts)
    for number in range(step):
        group, asked = canvases.step(number)
        group.visible(asked)
    group, asked = canvases.step(step)
    places = torch.full((len(prompts), max(prompts) + RESPONSE), -1, dtype=torch.int32)
    places[:2, 100:220:30] = torch.arange(8, dtype=torch.int32).view(2, 4)
    moved = torch.randn(8, KV_HEADS, DIM), places
    with monkeypatch.context() as patch, Launches(patch) as watch:
        if delta:
            group.delta(asked, *moved)
        else:
            group.attend(asked)
    return watch.found


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("name", SELECTIONS)
def test_launches_do_not_grow_with_canvases_and_wait_for_nothing(name, delta, monkeypatch):
    few = launches(SELECTIONS[name], PROMPTS[:2], monkeypatch, delta=delta)
    assert few == launches(SELECTIONS[name], PROMPTS, monkeypatch, delta=delta)
    assert few[-1] == ("sparse_delta" if delta else "sparse_attention")


#: launches of a layer beside its attention. Quest's scores are PyTorch's, and so are bands of long filters.
MOST = {"unique": 2, "unique, held": 2, "wavefilter/paper": 4, "wavefilter/serve": 7, "wavefilter/serve-page": 2}

#: of a layer, attention and all, where it is fast_dllm's
MOST_IN_ALL = 16


@pytest.mark.parametrize("name", MOST)
def test_few_launches(name, monkeypatch):
    found = launches(SELECTIONS[name], PROMPTS, monkeypatch)
    assert len(found) - 1 <= MOST[name], found


def test_a_wait_would_be_seen(monkeypatch):
    selection = SELECTIONS["unique"]
    monkeypatch.setattr(type(selection), "forced_from", lambda self, asked: asked.counts[asked.counts > 0])
    with pytest.raises(AssertionError, match="boolean index"):
        launches(selection, PROMPTS, monkeypatch)


# -- as a GPU would run it -----------------------------------------------------------------


def launched_on_a_gpu(monkeypatch, selection, reuse: str, count: int) -> list[str]:
    """By a layer in the second step between refreshes."""
    options = replace(server_options(None, "low_confidence"), selection=selection)
    monkeypatch.setattr(pretended_gpu, "server_options", lambda *_: options)
    with pretended_gpu.pretended(monkeypatch):
        step = pretended_gpu.Step(pretended_gpu.states(count, {"dlm_reuse": reuse}))
        step.run()
        return step.run().of_layer(1)


def for_a_gpu():
    """With something to leave out of prompts of 170 to 300, and pages that blocks of 64 divide into"""
    wave, pages = methods("selection")["wavefilter"], {"budget_tokens": 80, "page_size": 16, "dense_layers": ()}
    made = {"unique": methods("selection")["unique"](min_context=0, **pages), "quest": quest()(min_context=0, **pages)}
    for preset, fields in {"paper": {}, **wave.presets}.items():
        made[f"wavefilter/{preset}"] = wave(min_prompt=0, **fields)
    return made | {"wavefilter, db2": wave(min_prompt=0, wavelet="db2")}


ON_A_GPU = for_a_gpu()


@pytest.mark.parametrize("reuse", ["fast_dllm", "dllm_cache", "dyllm"])
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_gpu_waits_for_nothing(monkeypatch, name, reuse):
    few, many = (launched_on_a_gpu(monkeypatch, ON_A_GPU[name], reuse, count) for count in (2, 4))
    print(f"{name}, {reuse}: {len(many)} launches a layer", *many, sep="\n  ")
    assert len(few) == len(many) and any("sparse_attention" in operator for operator in many)


@pytest.mark.parametrize("name", sorted(MOST.keys() & ON_A_GPU.keys()))
def test_few_launches_on_a_gpu(monkeypatch, name):
    none, some = (
        len(launched_on_a_gpu(monkeypatch, selection, "fast_dllm", 4))
        for selection in (methods("selection")["none"](), ON_A_GPU[name])
    )
    assert some - none <= MOST[name] and some <= MOST_IN_ALL
