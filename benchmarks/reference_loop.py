"""The baseline: LLaDA's sampling loop as users write it on transformers, nothing dropped, nothing cached.

LLaDA is Llama under other tensor names and without the causal mask. Every step
runs all rows through all layers and the head, takes softmax and argmax over
[1, N, V], and commits the quota of the current block.

As a program (`python -m benchmarks.reference_loop`, a job as JSON on stdin,
results as JSON lines on stdout) it measures itself in a process of its own.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

#: in this order: `transformer.ff_out` is the head, a block's `ff_out` the down projection
LLAMA_NAMES = {
    "model.transformer.ff_out.": "lm_head.",
    "model.transformer.wte.": "model.embed_tokens.",
    "model.transformer.ln_f.": "model.norm.",
    "model.transformer.blocks.": "model.layers.",
    ".attn_norm.": ".input_layernorm.",
    ".ff_norm.": ".post_attention_layernorm.",
    ".q_proj.": ".self_attn.q_proj.",
    ".k_proj.": ".self_attn.k_proj.",
    ".v_proj.": ".self_attn.v_proj.",
    ".attn_out.": ".self_attn.o_proj.",
    ".ff_proj.": ".mlp.gate_proj.",
    ".up_proj.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
}


def load(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    hub = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(
        hidden_size=hub["d_model"],
        num_hidden_layers=hub["n_layers"],
        num_attention_heads=hub["n_heads"],
        num_key_value_heads=hub["n_kv_heads"],
        intermediate_size=hub["mlp_hidden_size"],
        vocab_size=hub["embedding_size"],
        max_position_embeddings=hub["max_sequence_length"],
        rms_norm_eps=hub["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": hub["rope_theta"]},
        tie_word_embeddings=hub["weight_tying"],
        is_causal=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    model.load_state_dict(
        {llama_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    )
    for layer in model.model.layers:
        # Together with the config's is_causal this means no mask at all, the cheapest way to see everything.
        layer.self_attn.is_causal = False
    return model


def llama_name(name: str) -> str:
    for theirs, ours in LLAMA_NAMES.items():
        name = name.replace(theirs, ours, 1)
    return name


def quotas(masks: int, steps: int) -> list[int]:
    """An even split, the first steps take the remainder."""
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def generate(model, prompt: list[int], new: int, block: int, steps: int, mask_id: int) -> list[int]:
    """Greedy low-confidence remasking -> the response. `steps` is for all of it, `block` divides it."""
    *_, canvas = generate_steps(model, prompt, new, block, steps, mask_id)
    return canvas[0, len(prompt) :].tolist()


@torch.inference_mode()
def generate_steps(model, prompt: list[int], new: int, block: int, steps: int, mask_id: int) -> Iterator[torch.Tensor]:
    """The canvas [1, N] after every step, the same tensor each time."""
    canvas = torch.full((1, len(prompt) + new), mask_id)
    canvas[0, : len(prompt)] = torch.tensor(prompt)
    for start in range(len(prompt), canvas.shape[1], block):
        end = start + block
        for quota in quotas(int((canvas[:, start:end] == mask_id).sum()), steps * block // new):
            logits = model(canvas, use_cache=False).logits  # [1, N, V]
            token = logits.argmax(-1)
            confidence = logits.softmax(-1).gather(-1, token[..., None])[..., 0]  # [1, N]
            confidence[canvas != mask_id] = -torch.inf
            confidence[:, end:] = -torch.inf
            chosen = confidence[0].topk(quota).indices
            canvas[0, chosen] = token[0, chosen]
            yield canvas


def main() -> None:
    """Job: checkpoint, dtype, threads, mask_id, block, repetitions, seconds, and cells of prompt ids, new and
    blocks, the number of them that is awaited."""
    from tqdm import tqdm

    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    model = load(Path(job["checkpoint"]), getattr(torch, job["dtype"]))
    for cell in job["cells"]:

        def run(steps_per_block: int, cell=cell) -> float:
            canvas_blocks = cell["new"] // job["block"]
            stop_after = steps_per_block * cell["blocks"]
            with tqdm(total=stop_after, desc="loop", unit="step", leave=False, position=1) as bar:
                begin = time.perf_counter()
                steps = generate_steps(
                    model,
                    cell["prompt"],
                    cell["new"],
                    job["block"],
                    steps_per_block * canvas_blocks,
                    job["mask_id"],
                )
                for _ in itertools.islice(steps, stop_after):
                    bar.update()
                return time.perf_counter() - begin

        run(2)  # warms allocators and oneDNN's primitive cache
        seconds = []
        while len(seconds) < job["repetitions"] and sum(seconds) < job["seconds"]:
            seconds.append(run(job["block"]))
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
