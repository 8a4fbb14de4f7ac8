"""The running engine against what the reference implementations compute."""

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.conftest import golden_tensors
from tests.engine.worker_calls import logits_of, states_of

LLADA = [
    "llada.g32_b32_s32_t0",
    "llada.g32_b8_s16_t0",
    "llada.g30_b10_s12_t0_remainder",
    "llada.g32_b8_s32_t0_logits_eos_inf",
    "llada.g32_b32_s32_t0_conf_eos_eot_inf",
    "llada.g32_b8_s32_cfg1.5_ones_mask",
    "llada.batch2_leftpad_g32_b8_s16_t0",
    "llada.single_of_batch_row1_g32_b8_s16_t0",
    "llada.fastdllm_nocache_thr0.9",
    "llada.fastdllm_nocache_factor1.0",
]
DREAM = [
    "dream.maskgit_plus_s12_t0",
    "dream.topk_margin_s16_t0",
    "dream.entropy_s32_t0",
    "dream.entropy_s16_t0",
    "dream.single_of_batch_row1_entropy_s16_t0",
    "dream.infill_entropy_s16_t0",
    "dream.fastdllm_threshold0.5_s8",
]
CASES = [("llada-tiny", LLADA), ("llada-tiny-gqa", ["llada.gqa_g32_b8_s16_t0"]), ("dream-tiny", DREAM)]
OPTION = {  # the reference functions' parameter names
    "steps": "dlm_steps",
    "block_length": "dlm_block_length",
    "eps": "dlm_eps",
    "alg": "dlm_decoding",
    "threshold": "dlm_threshold",
    "cfg_scale": "dlm_cfg_scale",
    "logits_eos_inf": "dlm_suppress_eos",
    "confidence_eos_eot_inf": "dlm_confidence_eos_eot_inf",
}


def requests_of(name: str, run: dict):
    """(prompt, parameters, expected response) of every row of a run."""
    params, tensors = run["params"], golden_tensors(name)
    options = {OPTION[key]: value for key, value in params.items() if key in OPTION and value is not None}
    if options.get("dlm_decoding") == "confidence_threshold":
        options["dlm_decoding"] = "maskgit_plus"  # Fast-dLLM ranks by probability under a threshold
    if "factor" in name:
        options["dlm_factor"] = 1.0
    length = params.get("gen_length", params.get("max_new_tokens"))
    sampling = SamplingParams(
        temperature=0, max_tokens=length, ignore_eos=True, extra_args=options, detokenize=False, logprobs=None
    )
    prompt, final = tensors["prompt"], tensors["final"]
    kept = tensors.get("attention_mask", torch.ones_like(prompt)).bool()
    for row in range(len(prompt)):
        yield {"prompt_token_ids": prompt[row][kept[row]].tolist()}, sampling, final[row, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(("checkpoint", "names"), CASES, ids=[case[0] for case in CASES])
def test_greedy_runs_token_for_token(engines, golden_runs, checkpoint, names):
    assert_greedy_runs(engines(checkpoint), golden_runs, names)


def assert_greedy_runs(llm, golden_runs, names: list[str]) -> None:
    """All runs of a checkpoint share one batch: lengths, steps, blocks and algorithms mixed."""
    rows = [(name, *row) for name in names for row in requests_of(name, golden_runs[name])]
    outputs = llm.generate([r[1] for r in rows], [r[2] for r in rows], use_tqdm=False)
    for (name, _, _, expected), output in zip(rows, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == expected, name


def test_masks_in_the_prompt_compete_as_in_the_reference(engines, golden_runs):
    """LLaDA's reference returns the masks it had no quota left for; here they are filled, all else is equal."""
    name = "llada.infill_masks_in_prompt_g16_b16_s8_t0"
    ((prompt, params, expected),) = requests_of(name, golden_runs[name])
    got = np.array(engines("llada-tiny").generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)
    left = np.array(expected) == 392
    assert left.sum() == 2
    assert (got[~left] == np.array(expected)[~left]).all()
    assert (got != 392).all()


@pytest.mark.parametrize("checkpoint", ["llada-tiny", "llada-tiny-gqa", "dream-tiny"])
def test_logits_and_hidden_states(engines, checkpoint):
    """Four canvases of different lengths in one packed forward, fp32 within 1e-4."""
    want = golden_tensors(f"{checkpoint}.logits")
    cases = ["c0", "c1", "c2", "c3"]
    canvases = [want[f"{case}.input_ids"][0].tolist() for case in cases]
    (got,) = engines(checkpoint).collective_rpc(states_of, args=(canvases,))
    for case, (hidden, logits) in zip(cases, got, strict=True):
        torch.testing.assert_close(hidden, want[f"{case}.hidden_states"], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(logits, want[f"{case}.logits"][0], atol=1e-4, rtol=1e-5)


def test_likelihood(engines, golden_runs):
    """LLaDA's Monte Carlo bound of log p(answer | prompt), with the reference's draws."""
    run = golden_runs["llada.loglik_seed0_mc32_bs8"]
    prompt, answer = run["prompt"], torch.tensor(run["answer"])
    torch.manual_seed(0)
    estimates = [likelihood_draw(engines("llada-tiny"), prompt, answer, rows=8) for _ in range(32 // 8)]
    assert abs(-np.mean(estimates) - run["value"]) < 1e-3


def likelihood_draw(llm, prompt: list[int], answer: torch.Tensor, rows: int) -> float:
    length = len(answer)
    first = torch.randint(1, length + 1, ())
    counts = torch.linspace(float(first), float(first + (rows - 1) * (length / rows)), steps=rows).round().long()
    counts = (counts - 1) % length + 1  # masked answer tokens per row
    masked = torch.stack([(torch.arange(length) < count)[torch.randperm(length)] for count in counts])
    noisy = torch.where(masked, 392, answer)
    (logits,) = llm.collective_rpc(logits_of, args=([prompt + row.tolist() for row in noisy],))
    logprobs = torch.stack(logits)[:, len(prompt) :].log_softmax(-1).gather(-1, answer.expand(rows, -1)[..., None])
    per_token = -logprobs[..., 0] * masked / (counts / length)[:, None]
    return per_token.sum().item() / rows
