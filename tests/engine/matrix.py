"""What every decoding with every reuse with every selection is held to, from what is registered at the time."""

import random

from vllm import SamplingParams

from tests.engine.batches import with_presets
from tests.engine.drawn import drawn
from tests.engine.running import all_blocks_are_free, answers, poison
from tests.soak.requests import SMALL
from vllm_dlm.methods import methods


def small(kind: str, name: str) -> dict:
    """Options with which a method has something to do at lengths of a test."""
    return {"name": name} | {field: SMALL[field] for field in SMALL if hasattr(methods(kind)[name], field)}


def pairs(presets: bool):
    """(decoding, reuse, a number) of every decoding with every reuse policy. The presets of a policy come in turn, or
    each of them with every decoding."""
    for turn, decoding in enumerate(sorted(methods("decoding"))):
        for place, policy in enumerate(sorted(methods("reuse"))):
            names = with_presets(policy)
            for name in names if presets else [names[turn % len(names)]]:
                yield decoding, name, turn + place


def combinations(selection: str, presets: bool = False, half: int | None = None):
    """A request of each pair: prompts of 40 to 90 tokens, canvases of 4 to 12, greedy and sampled, guided and not, the
    extents in turn. Either half, 0 or 1, has every decoding and every reuse policy."""
    rng = random.Random(selection)
    extents = sorted(methods("extent"))
    wanted = [pair for pair in pairs(presets) if half is None or pair[2] % 2 == half]
    for index, (decoding, reuse, turn) in enumerate(wanted):
        length = rng.randint(4, 12)
        chosen = "none" if index % 5 == 4 else selection
        extra = {"dlm_decoding": decoding, "dlm_reuse": reuse, "dlm_selection": chosen, "dlm_block_length": 6}
        extent = small("extent", extents[turn // 2 % len(extents)])
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


def assert_answers_are_those_alone(llm, given) -> None:
    """Whoever shares the batch, in either order; and caches of freed requests leak into nobody (all memory is NaN)."""
    together = answers(llm, given)
    assert answers(llm, given[::-3]) == together[::-3]  # the other way round, among others
    poison(llm)
    for request, want in zip(given, together, strict=True):
        assert answers(llm, [request]) == [want], request
    assert all_blocks_are_free(llm)


def assert_exact(engines, checkpoint, reuse: str) -> None:
    """With the field values it names itself, a reuse policy changes nothing."""
    plain, exact = engines(checkpoint), {"name": reuse} | methods("reuse")[reuse].exact
    given = [request for request in combinations("none") if request[1].extra_args.pop("dlm_reuse") == "none"]
    given += drawn(plain, 12, checkpoint, dlm_reuse=None, dlm_selection=None)
    found = answers(engines(checkpoint, additional_config={"dlm": {"reuse": exact}}), given)
    for request, own, wanted in zip(given, found, answers(plain, given), strict=True):
        assert own == wanted, request
