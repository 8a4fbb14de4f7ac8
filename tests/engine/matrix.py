"""What every decoding with every reuse with every selection is held to, from what is registered at the time."""

import random
from itertools import product

from vllm import SamplingParams

from tests.engine.batches import with_presets
from tests.engine.running import core_of, free_blocks, poison, tokens
from tests.engine.test_lifecycle import add, finish
from tests.soak.requests import SMALL
from vllm_dlm.methods import methods


def small(kind: str, name: str) -> dict:
    """Options with which a method has something to do at lengths of a test."""
    return {"name": name} | {field: SMALL[field] for field in SMALL if hasattr(methods(kind)[name], field)}


def combinations(selection: str):
    """A request of each: prompts of 40 to 90 tokens, canvases of 4 to 12, greedy and sampled, guided and not, the
    extents in turn."""
    rng = random.Random(selection)
    reuses = [name for method in sorted(methods("reuse")) for name in with_presets(method)]
    extents = sorted(methods("extent"))
    for index, (decoding, reuse) in enumerate(product(sorted(methods("decoding")), reuses)):
        length = rng.randint(4, 12)
        chosen = "none" if index % 5 == 4 else selection
        extra = {"dlm_decoding": decoding, "dlm_reuse": reuse, "dlm_selection": chosen, "dlm_block_length": 6}
        extent = small("extent", extents[index % len(extents)])
        extra["dlm_extent"] = extent["name"]
        if "window" in extent:
            extra["dlm_window"] = extent["window"]
        if index % 7 == 3:
            extra["dlm_cfg_scale"] = 0.5
        params = SamplingParams(
            temperature=0.8 * (index % 3 == 0),
            seed=index,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
        yield {"prompt_token_ids": [rng.randrange(390) for _ in range(rng.randint(40, 90))]}, params


def assert_tokens_are_those_alone(llm, given) -> None:
    """Whoever shares the batch, in either order; and caches of freed requests leak into nobody (all memory is NaN)."""
    together = tokens(llm, given)
    assert tokens(llm, given[::-3]) == together[::-3]  # the other way round, among others
    poison(llm)
    for request, want in zip(given, together, strict=True):
        assert tokens(llm, [request]) == [want], request[1].extra_args
    assert free_blocks(core_of(llm)) == core_of(llm).scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1


def assert_exact(engines, checkpoint, reuse: str) -> None:
    """With the field values it names itself, a reuse policy changes nothing."""
    given = [request for request in combinations("none") if request[1].extra_args.pop("dlm_reuse") == "none"]
    exact = {"name": reuse} | methods("reuse")[reuse].exact
    assert tokens(engines(checkpoint, additional_config={"dlm": {"reuse": exact}}), given) == tokens(
        engines(checkpoint), given
    )


def assert_blocks_begin_again(llm, given, after: tuple[int, ...]) -> None:
    """Preempted after so many steps, requests give the tokens they give undisturbed."""
    undisturbed = tokens(llm, given)
    for steps in after:
        add(llm, given)
        done = {}
        for _ in range(steps):
            done |= {out.request_id: tuple(out.outputs[0].token_ids) for out in llm.llm_engine.step() if out.finished}
        assert core_of(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
        done |= finish(llm)
        assert [done[f"r{index}"] for index in range(len(given))] == undisturbed
