"""attn_implementation="unique" in transformers' models: equal to SDPA if the mask is open, and otherwise independent of
padding and packing."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import vllm_dlm.training as sparse

SETTINGS = sparse.PageSparsity(
    budget_tokens=64, page_size=16, sink_pages=1, recent_pages=1, dense_layers=(), temperature=0.5
)
OPEN = replace(SETTINGS, budget_tokens=1 << 20)
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make(settings=SETTINGS, implementation="unique", cls=LlamaForCausalLM, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    model = cls._from_config(config(**SHAPE | changes), attn_implementation=implementation)
    for parameter in model.parameters():  # large enough that attention is sharp and pages matter
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    if settings is not None:
        sparse.configure(model, settings)
    return model


def ids(*shape):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cls, config", [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_an_open_mask_is_sdpa(cls, config, padding):
    mask = torch.ones(3, 100, dtype=torch.long)
    if padding != "none":
        for row, length in enumerate((100, 60, 31)):
            mask[row, slice(length, None) if padding == "right" else slice(0, 100 - length)] = 0
    given = {"input_ids": ids(3, 100), "attention_mask": mask}
    got, want = (make(OPEN, name, cls, config)(**given).logits for name in ("unique", "sdpa"))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side, causal):
    model = make(is_causal=causal)
    short, long = ids(1, 90), ids(1, 120)
    rows = torch.nn.functional.pad(short, (0, 30) if side == "right" else (30, 0))
    mask = torch.nn.functional.pad(torch.ones_like(short), (0, 30) if side == "right" else (30, 0))
    where = mask[0].bool()
    model.train()
    batch = model(
        torch.cat([rows, long]),
        attention_mask=torch.cat([mask, torch.ones_like(long)]),
        position_ids=torch.stack([(mask[0].cumsum(0) - 1).clamp_min(0), torch.arange(120)]),
    ).logits
    torch.testing.assert_close(batch[0][where], model(short).logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch[1], model(long).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_seqlens", [True, False])
def test_packed_sequences_do_not_meet(with_seqlens, causal):
    model = make(is_causal=causal).train()
    parts = [ids(1, n)[0] for n in (100, 7, 81)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=with_seqlens)
    batch = collator([{"input_ids": part.tolist()} for part in parts])
    batch.pop("labels")
    got = model(**batch).logits[0].split([len(part) for part in parts])
    for mine, part in zip(got, parts, strict=True):
        torch.testing.assert_close(mine, model(part[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tokens = ids(2, 120)
        model(tokens, labels=tokens, prompt_mask=torch.arange(120).expand(2, -1) < 20).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_the_mask_is_soft_in_training_and_hard_outside():
    model, tokens = make(), ids(1, 200)
    soft, hard = (model.train(training)(tokens).logits for training in (True, False))
    assert not torch.allclose(soft, hard, atol=1e-3)
    sparse.configure(model, hard=True)
    torch.testing.assert_close(model.train()(tokens).logits, hard)
    sparse.configure(model, hard=False, temperature=1e-6)
    torch.testing.assert_close(model(tokens).logits, hard, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_prompts_read_everything(causal):
    """The response of a bidirectional model chooses only among the prompt's pages."""
    model, tokens = make(is_causal=causal).eval(), ids(2, 200)
    dense = make(OPEN, is_causal=causal).eval()
    prompt = torch.arange(200).expand(2, -1) < torch.tensor([[150], [33]])
    got, want = model(tokens, prompt_mask=prompt).logits, dense(tokens, prompt_mask=prompt).logits
    if causal:
        torch.testing.assert_close(got[prompt], want[prompt], atol=1e-4, rtol=1e-4)
    else:  # 33 prompt tokens are within the budget
        torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[0], want[0], atol=1e-2)


def test_generation_with_a_cache_is_the_whole_forward():
    model = make().eval()
    prompt = ids(2, 100)
    out = model.generate(prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    whole = model(out.sequences).logits[:, 99:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-4, rtol=1e-4)


def test_dense_layers_and_short_contexts():
    tokens = ids(1, 120)
    want = make(OPEN).eval()(tokens).logits
    for settings in (replace(SETTINGS, dense_layers=(0, 1)), replace(SETTINGS, min_context=121)):
        torch.testing.assert_close(make(settings).eval()(tokens).logits, want)


def test_layers_with_a_window_stay_as_they_are():
    tokens = ids(2, 100)
    mask = torch.ones_like(tokens)
    mask[1, 80:] = 0
    got, want = (
        make(SETTINGS, name, MistralForCausalLM, MistralConfig, sliding_window=30)(tokens, attention_mask=mask).logits
        for name in ("unique", "sdpa")
    )
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()])


def test_encoders():
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        attention_probs_dropout_prob=0.0,
    )
    got = []
    for name in ("unique", "sdpa"):
        torch.manual_seed(0)
        model = BertModel._from_config(config, attn_implementation=name).eval()
        sparse.configure(model, OPEN)
        mask = torch.ones(2, 90, dtype=torch.long)
        mask[1, 50:] = 0
        got.append(model(ids(2, 90), attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*got, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_honoured_is_refused():
    model, tokens = make(), ids(1, 20)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_dropout"):
        make(attention_dropout=0.1).train()(tokens)
    for wrong in ({"page_size": 24}, {"budget_tokens": 16}, {"temperature": 0.0}, {"query_block": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sparse.configure(model, **wrong)


def test_binding_is_counted():
    model = make().train()
    with sparse.binding() as counted:
        model(ids(1, 200))
    shares = counted.shares
    assert 0.3 < shares["pages_under_threshold"] < 1
    assert 0 < shares["masked_weight_under_threshold"] < shares["dense_weight_under_threshold"]
    before = counted.rows
    model(ids(1, 200))
    assert counted.rows == before
