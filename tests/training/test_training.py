"""Schedules, LLaDA's loss, saving and resuming with transformers' Trainer, PEFT, and serving the result."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import vllm_dlm.training as sparse
from tests.conftest import GOLDEN, golden_tensors
from vllm_dlm.plugins.selection.unique import Unique
from vllm_dlm.training.diffusion import MaskedDiffusionCollator, MaskedDiffusionTrainer, masked_diffusion_loss
from vllm_dlm.training.llada import load_llada, save_llada

LLADA = GOLDEN / "checkpoints" / "llada-tiny-gqa"
SETTINGS = sparse.PageSparsity(budget_tokens=64, page_size=16, recent_pages=1, dense_layers=(0,), lam=0.25)


def tiny(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **changes,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="unique")
    sparse.configure(model, SETTINGS)
    return model


def arguments(folder, **changes):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        seed=0,
        **{"max_steps": 4} | changes,
    )


def samples(count=8, length=100):
    tokens = torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


@pytest.mark.parametrize("kind, middle", [("constant", 1.0), ("linear", 0.55), ("geometric", 0.1**0.5)])
def test_schedules(kind, middle):
    schedule = sparse.Schedule(1.0, 0.1, kind)
    assert schedule.at(0, 101) == (1.0, False)
    assert schedule.at(50, 101) == (pytest.approx(middle), False)
    assert schedule.at(100, 101)[0] == pytest.approx(1.0 if kind == "constant" else 0.1)
    halfway = sparse.Schedule(1.0, 0.1, kind, hard_share=0.5)
    assert [halfway.at(step, 8)[1] for step in range(8)] == [False] * 4 + [True] * 4
    assert halfway.at(3, 8)[0] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(sparse.Schedule(hard_share=1.0).at(step, 3)[1] for step in range(3))


def test_wrong_schedules_are_refused():
    for wrong in ({"kind": "cosine"}, {"start": 0.0}, {"hard_share": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sparse.Schedule(**wrong)


def test_trainer_saves_what_inference_needs_and_resumes(tmp_path):
    anneal = sparse.Schedule(1.0, 0.1, "linear", hard_share=0.25)

    def train(folder, resume=None, **changes):
        trainer = Trainer(
            tiny(), arguments(folder, **changes), train_dataset=samples(), callbacks=[sparse.Anneal(anneal)]
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    config = json.loads((tmp_path / "whole/checkpoint-4/config.json").read_text())
    assert config["unique"] == vars(sparse.settings_of(whole.model.config)) | {"dense_layers": [0]}
    assert config["unique"]["hard"] and config["unique"]["lam"] == 0.25
    assert [entry["mask_temperature"] for entry in whole.state.log_history[:4]] == pytest.approx([1.0, 0.55, 0.1, 0.0])
    resumed = train(tmp_path / "again", str(tmp_path / "whole/checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4", attn_implementation="unique")
    assert sparse.settings_of(loaded.config) == sparse.settings_of(whole.model.config)
    tokens = samples()[0]["input_ids"][None]
    torch.testing.assert_close(loaded.eval()(tokens).logits, whole.model.eval()(tokens).logits)


def test_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    trainer = Trainer(
        model, arguments(tmp_path, gradient_checkpointing=True), train_dataset=samples(), callbacks=[sparse.Anneal()]
    )
    trainer.train()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = json.loads((tmp_path / "merged/config.json").read_text())["unique"]
    assert saved["budget_tokens"] == 64 and saved["temperature"] == pytest.approx(0.1)
    changed = [n for n, p in tiny().named_parameters() if not torch.equal(p, merged.get_parameter(n))]
    assert changed and all("q_proj" in name or "k_proj" in name for name in changed)


# -- masked diffusion ------------------------------------------------------------------------------


def test_llada_is_llama(tmp_path):
    recorded = golden_tensors("llada-tiny-gqa.logits")
    tokens, want = recorded["c3.input_ids"], recorded["c3.logits"]
    for implementation in ("sdpa", "unique"):
        model = load_llada(LLADA, implementation).eval()
        sparse.configure(model, budget_tokens=1 << 20)
        got = model(tokens).logits
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    save_llada(model, tmp_path, LLADA, torch.float32)
    again = load_llada(tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, got)
    assert sparse.settings_of(again.config).budget_tokens == 1 << 20


def test_the_loss_is_lladas():
    """For a model with uniform output, the expected loss does not depend on the share of masked tokens."""
    collate = MaskedDiffusionCollator(mask=2, end=1, canvas=32)
    given = [
        {"prompt": [5] * 7, "answer": [6] * 20, "t": t, "seed": seed}
        for seed, t in enumerate(torch.linspace(0.2, 1.0, 400).tolist())
    ]
    batch = collate(given)
    assert batch["input_ids"].shape == (400, 39) and "attention_mask" not in batch
    assert (batch["input_ids"][:, :7] == 5).all() and batch["prompt_mask"].sum(1).unique().tolist() == [7]
    hidden = batch["labels"] != -100
    assert torch.equal(batch["input_ids"] == 2, hidden)
    assert set(batch["labels"][hidden].tolist()) == {1, 6}
    logits = torch.zeros(400, 39, 10)
    loss = masked_diffusion_loss(logits, batch["labels"], batch["weights"])
    assert float(loss) == pytest.approx(torch.tensor(10.0).log().item(), rel=0.03)


def test_shifted_logits_belong_to_the_next_position():
    labels = torch.tensor([[-100, 3, -100]])
    logits = torch.full((1, 3, 5), -9.0)
    logits[0, 0, 3] = 9.0
    weights = torch.ones(1, 3)
    assert (
        masked_diffusion_loss(logits, labels, weights, shift=1) < 1e-3 < masked_diffusion_loss(logits, labels, weights)
    )


def test_prompts_of_different_length():
    collate = MaskedDiffusionCollator(mask=2, end=1)
    short, long = (
        {"prompt": [3 + i * i % 50 for i in range(n)], "answer": [40, 41, 1], "t": 1.0, "seed": 0} for n in (20, 110)
    )
    model = tiny(is_causal=False).train()

    def response(*given):
        batch = collate(list(given))
        return model(**{k: v for k, v in batch.items() if k not in ("labels", "weights")}).logits[:, -3:]

    together = response(short, long)
    torch.testing.assert_close(together[:1], response(short), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1:], response(long), atol=1e-5, rtol=1e-4)


def test_masked_diffusion_training_resumes(tmp_path):
    given = [{"prompt": [5] * 80, "answer": [i, 1], "t": 0.7, "seed": i} for i in range(8)]
    states = []
    for folder, resume in (("a", None), ("b", str(tmp_path / "a/checkpoint-2"))):
        model = load_llada(LLADA)
        sparse.configure(model, SETTINGS)
        collate = MaskedDiffusionCollator(mask=model.config.mask_token_id, end=1, canvas=4)
        trainer = MaskedDiffusionTrainer(
            model,
            arguments(tmp_path / folder, remove_unused_columns=False),
            collate,
            given,
            callbacks=[sparse.Anneal()],
        )
        trainer.train(resume_from_checkpoint=resume)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)


# -- serving ---------------------------------------------------------------------------------------


def test_a_server_that_names_the_selection_takes_its_fields_from_the_checkpoint():
    from transformers import PretrainedConfig

    from vllm_dlm.configuration import resolved_options

    def options(given, trained=True):
        hf_config = PretrainedConfig(**({"unique": tiny().config.unique} if trained else {}))
        model = SimpleNamespace(architecture="LLaDAModelLM", hf_config=hf_config)
        return resolved_options(SimpleNamespace(model_config=model, additional_config=given and {"dlm": given}))

    named = {"selection": {"name": "unique"}}
    found = options(named).selection
    assert {name: getattr(found, name) for name in SETTINGS.serving()} == SETTINGS.serving()
    own = options({"selection": {"name": "unique", "min_context": 3}}).selection
    assert (own.min_context, own.budget_tokens) == (3, SETTINGS.budget_tokens)
    assert options(named, trained=False).selection == Unique()
    for given in (None, {"decoding": {"name": "random"}}, {"selection": {"name": "none"}}):
        assert options(given).selection.name == "none"


def test_a_folder_of_other_settings_is_not_gone_on_with(tmp_path):
    from examples.training.recipe import Recipe

    recipe = Recipe(output=tmp_path, steps=7)
    recipe.claim()
    (tmp_path / "checkpoint-5").mkdir()
    Recipe(output=tmp_path, steps=7, save_every=3).claim()  # fields that do not affect the result may differ
    with pytest.raises(SystemExit, match=r"holds a training with steps 7 \(now 8\); give another --output, or --fresh"):
        Recipe(output=tmp_path, steps=8).claim()
    assert (tmp_path / "checkpoint-5").exists()
    Recipe(output=tmp_path, steps=8, fresh=True).claim()
    assert not (tmp_path / "checkpoint-5").exists()
    Recipe(output=tmp_path, steps=8).claim()
