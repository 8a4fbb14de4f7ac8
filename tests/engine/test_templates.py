"""Templates in the running engine: what stands stays, and holes hold what they may, however they are decoded."""

import json
import random
import re

import pytest
from vllm import SamplingParams

from tests.engine.by_hand import most_probable_first
from tests.engine.matrix import pairs, small
from tests.engine.running import Watching
from tests.integration.serving import CHECKPOINT, chat_text
from tests.tiers import slow
from vllm_dlm.methods import methods

DEMO, DREAM = str(CHECKPOINT), "dream-tiny"
CHECKPOINTS = [DEMO, DREAM]
SPARSE = sorted(name for name, selection in methods("selection").items() if selection.sparse)
PERSON = (
    '{"name": "[[6:string]]", "age": [[3:number]], "likes": [[[2:string]], "x"], '
    '"colour": "[[10:one of "red"|"light blue"|"blue"]]"}'
).replace('[[[2:string]], "x"]', '["[[2:string]]", "x"]')


def person(text: str) -> dict:
    """Asserts that it is what the template says."""
    found = json.loads(text)
    assert list(found) == ["name", "age", "likes", "colour"], text
    assert isinstance(found["name"], str) and isinstance(found["age"], int | float) and found["likes"][1] == "x"
    assert found["colour"] in ("red", "light blue", "blue")
    return found


def params(template: str, **fields) -> SamplingParams:
    extra = {"dlm_template": template} | fields.pop("extra", {})
    return SamplingParams(**{"temperature": 0, "max_tokens": None, "extra_args": extra} | fields)


def texts(llm, given) -> list[str]:
    prompts, sampling = zip(*given, strict=True)
    return [output.outputs[0].text for output in llm.generate(list(prompts), list(sampling), use_tqdm=False)]


@pytest.mark.slow
def test_two_hundred_objects(engines):
    """Whatever the demo's model writes, at any temperature, with a word it is sure of or none"""
    llm, rng = engines(DEMO, max_model_len=512), random.Random(0)
    prompts = ["Copy: k b x e", 'Copy: " " "', "What is the color of the boat?", "Reverse: 3 1 2", "Sort: \\ \\ \n"]
    given = []
    for seed in range(200):
        extra = {"dlm_block_length": rng.choice([3, 8, 32])}
        if seed % 3 == 0:
            extra["dlm_threshold"] = rng.choice([0.01, 0.3])
        given.append((rng.choice(prompts), params(PERSON, temperature=seed % 5 / 2, seed=seed, extra=extra)))
    found = [person(text) for text in texts(llm, given)]
    assert len({found_one["name"] for found_one in found}) > 50
    assert {found_one["colour"] for found_one in found} == {"red", "light blue", "blue"}


@pytest.mark.parametrize(
    ("checkpoint", "selection", "presets"),
    [(DREAM, "none", False), *slow(*((DEMO, selection, True) for selection in ["none", *SPARSE]))],
)
def test_every_decoding_with_every_reuse(engines, checkpoint, selection, presets):
    config = {"dlm": {"selection": small("selection", selection)}}
    llm, given = engines(checkpoint, additional_config=config), []
    extents = sorted(methods("extent"))
    for index, (decoding, reuse, turn) in enumerate(pairs(presets)):
        extra = {"dlm_decoding": decoding, "dlm_reuse": reuse, "dlm_block_length": 6 if index % 3 else 32}
        extra["dlm_extent"] = extents[turn % len(extents)]
        if index % 7 == 3:
            extra["dlm_cfg_scale"] = 0.5
        given.append(("Copy: a b " * 4, params(PERSON, temperature=index % 3 / 2, seed=index, extra=extra)))
    for (_, sampling), text in zip(given, texts(llm, given), strict=True):
        try:
            person(text)
        except Exception as error:
            raise AssertionError(sampling.extra_args, text) from error


def test_as_by_hand(engines):
    """Fixed parts are seen from the first step. No end is proposed here, so a free hole is what the model says."""
    llm = engines(DREAM)
    tokenizer, mask = llm.get_tokenizer(), llm.model_config.hf_config.mask_token_id
    prompt, parts = [7, 8, 9, 30, 41], [tokenizer.encode(text, add_special_tokens=False) for text in ("ab", " c", "d")]
    canvas = [*prompt, *parts[0], *[mask] * 5, *parts[1], *[mask] * 3, *parts[2]]
    extra = {"dlm_decoding": "low_confidence", "dlm_block_length": 32}
    given = [{"prompt_token_ids": prompt}], [params("ab[[5]] c[[3]]d", extra=extra)]
    (output,) = llm.generate(*given, use_tqdm=False)
    *got, end = output.outputs[0].token_ids
    assert end == tokenizer.eos_token_id and output.outputs[0].finish_reason == "stop"
    want = most_probable_first(llm, canvas, (len(prompt), len(canvas)), len(canvas))
    ends = {tokenizer.eos_token_id, llm.model_config.hf_config.eot_token_id}
    assert not ends & set(want), "choose another prompt"
    assert got == want


def test_what_stands_is_read(engines):
    llm = engines(DEMO, max_model_len=512)
    given = [(chat_text("Copy: k b x e"), params(template)) for template in (" k[[2]] e", "[[3]] e", " k b[[2]]")]
    assert texts(llm, given) == [" k b x e"] * 3


def test_blocks_count_masks_and_stream(engines):
    llm = engines(DREAM)
    llm.llm_engine.add_request("r", "Copy:", params("one [[4]] two [[4]] three", extra={"dlm_block_length": 4}))
    pieces = []
    while llm.llm_engine.has_unfinished_requests():
        pieces += [output.outputs[0].text for output in llm.llm_engine.step()]
    assert len(pieces) == 2 and pieces[0].startswith("one ") and " two " in pieces[0] and pieces[1].endswith(" three")


def test_holes_end_early(engines):
    """The demo's model ends its answer in the hole; what stands behind stays, and the rest is not decoded."""
    llm = engines(DEMO, max_model_len=512)
    steps, extra = [], {"dlm_block_length": 4}
    for length in (30, 4):
        llm.llm_engine.add_request("r", chat_text("Copy: k b x e"), params(f"[[{length}]]!", extra=extra))
        steps.append(0)
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            steps[-1] += 1
        assert outputs[-1].outputs[0].text == " k b x e!"
    assert steps[0] <= steps[1] + 6  # the ends of 25 positions took no steps of their own


def test_no_step_is_wasted_after_a_hole_has_ended(engines):
    """Each forward fills a mask, with a hole of 200 positions that ends early and in the example of the docs."""
    llm = engines(DEMO, max_model_len=512)
    examples = {"[[8:string]] x [[200:string]] y": None, '{"name": "[[12:string]]", "born": [[4:number]]}': 16}
    for template, width in examples.items():
        llm.llm_engine.add_request(
            "r", chat_text("Copy: k b x e"), params(template, extra={"dlm_block_length": width or "none"})
        )
        with Masks(llm) as masks:
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
        assert masks.left == sorted(set(masks.left), reverse=True)


class Masks(Watching):
    """Masks of the one request before each step"""

    def __enter__(self):
        self.left = []
        return super().__enter__()

    def step_begins(self, states):
        (state,) = states
        self.left.append(int((state.canvas.tokens == state.canvas.mask_id).sum()))


@pytest.mark.parametrize(
    "template", ["ab[[2]]cd", "é[[2]] 日本 [[1]]\n\t", '"[[1]]"[[1]]\\[[2]]', "  [[2]]  x", "[[1]]"]
)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_no_character_is_lost_or_merged(engines, checkpoint, template):
    (text,) = texts(engines(checkpoint), [("Copy: a", params(template))])
    parts = [re.escape(part) for part in re.split(r"\[\[\d\]\]", template)]
    assert re.fullmatch("(.|\n)*".join(parts), text), text


def test_logprobs_and_samples(engines):
    llm = engines(DREAM)
    (output,) = llm.generate(["Copy:"], [params(PERSON, n=3, temperature=1.0, seed=1, logprobs=2)], use_tqdm=False)
    assert len({one.text for one in output.outputs}) == 3
    for one in output.outputs:
        person(one.text)
        records = list(zip(one.token_ids, one.logprobs, strict=True))
        assert all(token in record for token, record in records)
        assert records[0][1][records[0][0]].logprob == 0 and len(records[0][1]) == 1  # it stood from the start
        assert min(record[token].logprob for token, record in records) < 0


REFUSED = {
    "no hole": (params("abc"), "it has no hole: a hole is [[n]]"),
    "no kind": (params("[[3:words]]"), "is not a hole"),
    "not a text": (params("a", extra={"dlm_template": 3}), "dlm_template: 3 is not valid, it must be str"),
    "too long": (params("[[250]]", extra={}), "dlm_template"),
    "too long by itself": (params("[[200]]" * 2), "it has at least 401 tokens with its end; the model's length is 256"),
    "a stop": (params("[[5]]", stop=["a"]), "stop: ['a'] is not supported"),
    "longer than anything": (params("[[257]]"), "the length of a hole must be between 1 and 256 tokens"),
    "max_tokens": (params("[[5]]", max_tokens=5), "max_tokens: 5 is not supported: it must be at least 6"),
    "an alternative": (
        params('[[1:one of "a"|"0123456789abcdef"]]'),
        "'0123456789abcdef' has",
    ),
    "ignore_eos": (params("[[5]]", ignore_eos=True), "ignore_eos: True is not supported"),
    "with a suffix": (params("[[5]]", extra={"dlm_suffix": "a"}), "dlm_suffix: 'a' is not supported"),
    "a special token": (params("<|endoftext|>[[3]]"), "contains a token that has no text"),
}


@pytest.mark.parametrize(("sampling", "says"), REFUSED.values(), ids=REFUSED)
def test_refused(engines, sampling, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        engines(DREAM).generate(["Copy: a b c d"], [sampling], use_tqdm=False)


@pytest.mark.parametrize("checkpoint", ["llada2-tiny", "sdar-tiny"])
def test_models_that_know_blocks_refuse_it(engines, checkpoint):
    with pytest.raises(ValueError, match=r"dlm_template.*a canvas block does not attend to later positions"):
        engines(checkpoint).generate([{"prompt_token_ids": [5]}], [params("[[3]]", detokenize=False)], use_tqdm=False)
