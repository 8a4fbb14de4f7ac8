"""The attention and mask functions that transformers calls under the name "unique".

A mask of this kind has one number per key instead of one per pair of query and
key: 0 for padding, else the id of the sequence that the key belongs to. Read in
transformers 5.19: masking_utils.py (`create_causal_mask`, `sdpa_mask`),
integrations/sdpa_attention.py, integrations/flash_attention.py.
"""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_dlm.kernels.soft_page_attention import measure, soft_page_attention
from vllm_dlm.kernels.soft_page_attention.measure import Binding
from vllm_dlm.training.sequences import attend_by_span, restarts, spans_of
from vllm_dlm.training.settings import settings_of

NAME = "unique"
#: arguments of attention functions that are not supported
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")

_measuring: list[Binding] = []


def register() -> None:
    AttentionInterface.register(NAME, page_attention)
    AttentionMaskInterface.register(NAME, sequence_ids)


@contextmanager
def binding():
    """Context manager in which forwards also measure how much the mask binds: `with binding() as counted: model(…)`."""
    counted = Binding()
    _measuring.append(counted)
    try:
        yield counted
    finally:
        _measuring.remove(counted)


def page_attention(
    module,
    query: torch.Tensor,  # [B, H, T, D]
    key: torch.Tensor,  # [B, Hkv, N, D]
    value: torch.Tensor,  # [B, Hkv, N, D]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """-> [B, T, H, D]. The model input `prompt_mask` [B, N] marks tokens that serving would prefill. Their queries read
    everything, and a bidirectional response chooses among their pages."""
    local = kwargs.get("sliding_window") is not None
    if attention_mask is not None and attention_mask.ndim == 4:
        if not local and not getattr(attention_mask, "local", False):
            raise ValueError("attention_mask: a mask of pairs cannot be combined with a mask of pages")
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: not supported by attn_implementation={NAME!r}")
    if dropout:
        raise ValueError(f"attention_dropout: must be 0 with attn_implementation={NAME!r}, not {dropout}")

    settings = settings_of(module.config)
    causal = causality(module, is_causal)
    layer = getattr(module, "layer_idx", None)
    gate = settings.gate(causal, module.training, dense=layer in settings.dense_layers)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:  # a static KV cache may be longer than its written part
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    ids, positions = attention_mask, kwargs.get("position_ids")
    if ids is None and positions is not None and positions.shape[-1] == key.shape[2] > 1 and positions.ndim == 2:
        ids = restarts(positions.expand(len(query), -1))
    spans = spans_of(len(query), key.shape[2], ids, kwargs.get("cu_seq_lens_k"), kwargs.get("prompt_mask"))

    def attend(q, k, v, prompt):
        for counted in _measuring:
            counted += measure(q, k, gate, scale, prompt)
        return soft_page_attention(q, k, v, gate, scale, prompt)

    return attend_by_span(attend, query, key, value, spans).transpose(1, 2).contiguous(), None


def causality(module, is_causal: bool | None) -> bool:
    """Whether attention is causal. The config takes precedence, because modules of a decoder that its config makes
    bidirectional still claim to be causal."""
    if is_causal is None:
        is_causal = getattr(module.config, "is_causal", None)
    return getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)


def sequence_ids(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    use_vmap=False,
    local_size=None,
    device=None,
    **kwargs,
) -> torch.Tensor | None:
    """Mask function -> [B, N] int, or None if every row is one sequence without padding"""
    if local_size is not None:
        # Layers with a sliding window keep their mask.
        mask = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            use_vmap=use_vmap,
            local_size=local_size,
            device=device,
            **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
        mask.local = True
        return mask
    if use_vmap:
        raise ValueError("attention_mask: a mask function of the model cannot be combined with a mask of pages")
    written = int(q_offset) + q_length - kv_offset
    ids = None
    if attention_mask is not None and not (bool(attention_mask.all()) and attention_mask.shape[1] == written):
        ids = attention_mask[:, :written].long()
    if q_length == kv_length > 1:
        ids = packed(batch_size, kv_length, mask_function, ids, device)
    if ids is None and written < kv_length:
        ids = torch.ones(batch_size, written, dtype=torch.long, device=device)
    return ids


def packed(batch_size, length, mask_function, ids, device):
    """Detects packed sequences by asking the mask function whether key i is visible to query i + 1 -> ids [B, N]"""
    row = torch.arange(batch_size, device=device)[:, None]
    head, first = torch.zeros_like(row), torch.arange(length - 1, device=device)[None]
    back = mask_function(row, head, first + 1, first).expand(batch_size, length - 1)
    ahead = mask_function(row, head, first, first + 1).expand(batch_size, length - 1)
    if not (bool((ahead == back).all()) or not bool(ahead.any())):
        raise ValueError("attention_mask: blocks within a causal mask cannot be combined with a mask of pages")
    if bool(back.all()):
        return ids
    runs = torch.nn.functional.pad((~back).cumsum(1), (1, 0)) + 1  # [B, N]
    return runs if ids is None else runs * ids
