"""A denoising step on tensors that claim to lie on a GPU: what it launches, and what it would have to wait for.

Shapes are all there is to such tensors, so an operator whose output depends on
their contents, or a look at these, is an error.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tests.kernels.watched import Watched
from vllm_dlm.cache.blocks import KVBlocks
from vllm_dlm.cache.budget import BlockShape
from vllm_dlm.canvas.canvas import Canvas, Commit
from vllm_dlm.canvas.denoising import Denoising, Sampling
from vllm_dlm.models.feed_forward import GatedMLP
from vllm_dlm.models.transformer import DiffusionLayer
from vllm_dlm.options import request_options, server_options
from vllm_dlm.plugins.reuse.base import RowShape
from vllm_dlm.step.counts import Counts
from vllm_dlm.step.denoiser import Denoiser
from vllm_dlm.step.head import Head
from vllm_dlm.step.layer import LayerStep
from vllm_dlm.step.upload import DTYPES

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, INNER, VOCABULARY, MASK = 4, 8, 2, 64, 512, 1024, 1000, 999
BLOCK_SIZE, BLOCKS = 64, 256
GPU = torch.device("cuda")

#: what vLLM has compiled for a GPU, a launch each
_LIBRARY = torch.library.Library("dlm_pretended", "DEF")
for schema, fake in {
    "rms_norm(Tensor x) -> Tensor": lambda x: torch.empty_like(x),
    "silu_and_mul(Tensor x) -> Tensor": lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
}.items():
    _LIBRARY.define(schema)
    torch.library.register_fake(f"dlm_pretended::{schema.partition('(')[0]}", fake, lib=_LIBRARY)


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight, self.variance_epsilon = tensor(width), 1e-5

    def forward(self, x):
        return torch.ops.dlm_pretended.rms_norm(x)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(tensor(outputs, inputs), requires_grad=False), None
        # without its __init__, which asks vLLM for a kernel
        self.quant_method = UnquantizedLinearMethod.__new__(UnquantizedLinearMethod)
        self.output_size_per_partition = outputs

    def forward(self, x):
        return F.linear(x, self.weight), None


def tensor(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def layer() -> DiffusionLayer:
    """The project's own, with linear layers and norms as a GPU has them."""
    made = DiffusionLayer.__new__(DiffusionLayer)
    nn.Module.__init__(made)
    made.head_dim, made.num_heads, made.num_kv_heads = DIM, HEADS, KV_HEADS
    made.input_layernorm, made.post_attention_layernorm = Norm(WIDTH), Norm(WIDTH)
    outputs = {"q_proj": HEADS * DIM, "k_proj": KV_HEADS * DIM, "v_proj": KV_HEADS * DIM}
    projections = {name: Linear(WIDTH, output) for name, output in outputs.items()}
    made.self_attn = nn.ModuleDict(projections | {"o_proj": Linear(HEADS * DIM, WIDTH)})
    made.mlp = GatedMLP.__new__(GatedMLP)
    nn.Module.__init__(made.mlp)
    made.mlp.gate_up_proj, made.mlp.down_proj = Linear(WIDTH, 2 * INNER), Linear(INNER, WIDTH)
    made.mlp.act = torch.ops.dlm_pretended.silu_and_mul
    made.join_projections()
    return made


def model() -> SimpleNamespace:
    embedding, head = tensor(VOCABULARY, WIDTH), tensor(VOCABULARY, WIDTH)
    return SimpleNamespace(
        model=SimpleNamespace(
            layers=[layer() for _ in range(LAYERS)],
            rope=SimpleNamespace(table=tensor(4096, DIM, dtype=torch.float32)),
        ),
        embed_input_ids=lambda ids: embedding[ids],
        compute_logits=lambda hidden: F.linear(torch.ops.dlm_pretended.rms_norm(hidden), head),
    )


class Upload:
    """See vllm_dlm/step/upload.py; nothing is sent."""

    device = GPU

    def __call__(self, array: np.ndarray, name: str = "") -> torch.Tensor:
        return tensor(*array.shape, dtype=DTYPES[array.dtype])

    @property
    def nowhere(self) -> torch.Tensor:
        return tensor(dtype=torch.int64)

    def send(self) -> None: ...


class WatchedLayers(Watched):
    """Layer by layer"""

    def __init__(self):
        super().__init__(uploads=False)
        self.layers: list[int] = []  # how many had been launched when each layer began

    def of_layer(self, index: int) -> list[str]:
        return self.launched[self.layers[index] : self.layers[index + 1]]


class Step:
    """One of some requests: packed, run through the layers and the head."""

    def __init__(self, states: list[Denoising]):
        shape = BlockShape(BLOCK_SIZE, KV_HEADS, DIM, RowShape(HEADS * DIM, WIDTH))
        config = SimpleNamespace(vocab_size=VOCABULARY, eos_token_id=1, eot_token_id=2, mask_token_id=MASK)
        made = model()
        head = Head(made.compute_logits, config, 1 << 27)
        self.denoiser = Denoiser(made, head, shape, 1 << 16, torch.device("cpu"))
        self.denoiser.device, self.denoiser.upload = GPU, Upload()
        cache = (BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * DIM)
        self.denoiser.blocks = KVBlocks([tensor(*cache) for _ in range(LAYERS)])
        self.states, self.tables, first = states, {}, 1
        for state in states:
            own = shape.tokens(state.options, state.canvas.prompt_len, len(state.canvas)) // BLOCK_SIZE
            self.tables[state.req_id] = np.arange(first, first := first + own)

    def run(self) -> WatchedLayers:
        denoiser = self.denoiser
        streams = [
            stream for state in self.states for stream in state.streams(denoiser.caches, self.tables[state.req_id])
        ]
        prepared = denoiser._prepared(streams)
        with WatchedLayers() as watched, layers_noted(watched):
            hidden = denoiser._hidden(prepared, Counts())
            watched.layers.append(len(watched.launched))
            for batch in prepared.head:
                denoiser.head._proposed(hidden, batch)
        return watched


class Indexed(TorchFunctionMode):
    """x[…] by operators: PyTorch's own way there looks for the device first."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            x, tensors = viewed(*args)
            return x if not tensors else torch.ops.aten.index.Tensor(x, tensors)
        if function is torch.Tensor.__setitem__:
            x, tensors = viewed(*args[:2])
            if tensors and not isinstance(args[2], torch.Tensor):
                raise NotImplementedError("a number, to places that a tensor tells")
            return torch.ops.aten.index_put_(x, tensors, args[2]) if tensors else torch.ops.aten.copy_(x, args[2])
        return function(*args, **(kwargs or {}))


def viewed(x: torch.Tensor, places) -> tuple[torch.Tensor, list]:
    """What is left of x[places] when slices and numbers are done, and the indices that are tensors"""
    places, tensors, dim = places if isinstance(places, tuple) else (places,), [], 0
    if Ellipsis in [place for place in places if not isinstance(place, torch.Tensor)]:
        where = next(i for i, place in enumerate(places) if place is Ellipsis)
        rest = x.dim() - sum(place is not None and place is not Ellipsis for place in places)
        places = (*places[:where], *[slice(None)] * rest, *places[where + 1 :])
    for place in places:
        if place is None:
            x, dim = x.unsqueeze(dim), dim + 1
            tensors.append(None)
        elif isinstance(place, torch.Tensor):
            dim += 1
            tensors.append(place)
        elif isinstance(place, slice):
            if place != slice(None):
                x = torch.ops.aten.slice.Tensor(x, dim, place.start, place.stop, place.step or 1)
            dim += 1
            tensors.append(None)
        else:
            x = x.select(dim, place)
    while tensors and tensors[-1] is None:
        tensors.pop()
    return x, tensors


@contextmanager
def layers_noted(watched: WatchedLayers):
    run = LayerStep.run

    def noted(step, index, normed):
        watched.layers.append(len(watched.launched))
        return run(step, index, normed)

    LayerStep.run = noted
    try:
        yield
    finally:
        LayerStep.run = run


def states(count: int, extra: dict, prompts=(300, 200, 170, 260), length: int = 64) -> list[Denoising]:
    """Of ragged canvases between two refreshes, if their policy knows such steps."""
    made = []
    for number in range(count):
        options = request_options(server_options(None, "low_confidence"), {"dlm_block_length": 32} | extra)
        prompt = [7] * prompts[number % len(prompts)]
        canvas = Canvas(options, MASK, 0, prompt, len(prompt) + length - 8 * (number % 3))
        sampling = Sampling(0.0, 1.0, 0, seed=number, stop_ids=frozenset())
        while canvas.step == 0 or (canvas.plan.refresh and canvas.step < 16):
            read = canvas.candidates()
            filled = np.array([0])
            canvas.apply(Commit(read, np.full(len(read), 0.5, np.float32), filled, np.array([5])))
        made.append(Denoising(f"r{number}", canvas, sampling))
    return made


@contextmanager
def pretended(monkeypatch):
    monkeypatch.setattr("vllm_dlm.step.attention.installed", lambda: True)
    monkeypatch.setattr("vllm_dlm.models.transformer.get_tensor_model_parallel_world_size", lambda: 1)
    with FakeTensorMode(), Indexed():
        yield
