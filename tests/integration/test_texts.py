"""What the texts of a request may cost: bounds before anything reads them, one encoding each, and no trace of what was
refused."""

import asyncio
import copy
import re
import threading
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request

from tests.engine.running import core_of
from vllm_dlm.integration import bodies, requests
from vllm_dlm.integration.scheduler.open_canvases import OpenCanvases
from vllm_dlm.request import hole_automata as automaton
from vllm_dlm.request import parsing, texts
from vllm_dlm.request.canvas_request import CANVAS_REQUEST
from vllm_dlm.request.served_model import served_model
from vllm_dlm.request.vocabulary import Vocabulary, vocabulary_of
from vllm_dlm.shown import shown

DREAM = "dream-tiny"
HUGE = 10 << 20
PROMPT = {"type": "token", "prompt_token_ids": [7, 8, 9]}


@pytest.fixture
def llm(engines):
    return engines(DREAM)


@pytest.fixture
def processor(llm):
    return llm.llm_engine.input_processor


@pytest.fixture
def encoded(processor, monkeypatch) -> list[tuple[str, int]]:
    """Texts that the tokenizer encoded, and in which thread"""
    found, tokenizer = [], processor.get_tokenizer()
    encode = tokenizer.encode

    def counted(text, **kwargs):
        found.append((text, threading.get_ident()))
        return encode(text, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", counted)
    return found


def params(template: str | None = None, **extra) -> SamplingParams:
    extra |= {"dlm_template": template} if template else {}
    return SamplingParams(temperature=0, max_tokens=None if template else 8, extra_args=extra)


def process(llm, sampling, prompt=PROMPT):
    return llm.llm_engine.input_processor.process_inputs("r", prompt, sampling, llm.supported_tasks)


def vocabulary(processor) -> Vocabulary:
    return vocabulary_of(served_model(processor))


def kept(processor) -> tuple[int, int]:
    own = vocabulary(processor)
    return len(own.layouts), len(own.alternatives)


# -- bounds before anything reads a text ---------------------------------------------------------

LONG = {
    "a template": ("dlm_template", "[[3]]" + "y" * HUGE, "limits.template_characters"),
    "a template of holes": ("dlm_template", "[[3]]" * (HUGE // 5), "limits.template_characters"),
    "one too many": ("dlm_template", "[[3]]" + "y" * ((1 << 16) - 4), "65537 characters, and the limit is 65536"),
    "a suffix": ("dlm_suffix", "y" * HUGE, f"it has {HUGE} characters, more than 256 tokens can have"),
    "a draft": ("dlm_start", "y" * HUGE, f"it has {HUGE} characters, more than 256 tokens can have"),
    "ids of a suffix": ("dlm_suffix", [7] * (HUGE // 8), "token ids, and the model's length is 256"),
    "ids of a draft": ("dlm_start", [7] * 257, "it has 257 token ids, and the model's length is 256"),
    "no ids at all": ("dlm_start", ["a"] * (HUGE // 8), "token ids, and the model's length is 256"),
}


@pytest.mark.parametrize(("field", "value", "says"), LONG.values(), ids=LONG)
def test_long_texts_are_refused_unread(llm, encoded, monkeypatch, field, value, says):
    monkeypatch.setattr(texts, "parse", lambda *_: pytest.fail("parsed"))
    monkeypatch.setattr(parsing, "request_options", lambda *_: pytest.fail("validated"))
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        process(llm, SamplingParams(max_tokens=8, extra_args={field: value}))
    assert str(error.value).startswith(f"{field}: ") and len(str(error.value)) < 500
    assert not encoded


def test_the_same_alternatives_are_one_automaton(processor):
    model = served_model(processor)
    made = texts.template_layout('[[3:one of "a"|"b"]] [[4:one of "a"|"b"]] [[2:number]]', model.options, model)
    assert len(made.layout.automata) == 2 and [of for _, _, of in made.layout.holes] == [0, 0, 1]


def test_values_are_shortened_before_they_are_rendered():
    class Marked(str):
        def __repr__(self):
            raise AssertionError("all of it is rendered")

    assert shown(Marked("y" * HUGE)) == shown("y" * HUGE) and len(shown(Marked("y" * HUGE))) <= 102


# -- refused templates ---------------------------------------------------------------------------


def test_a_template_that_is_too_long_is_refused_before_the_rest_is_encoded(llm, processor, encoded, monkeypatch):
    monkeypatch.setattr(automaton, "one_of", lambda *_: pytest.fail("an automaton is built"))
    assert vocabulary(processor).texts and not encoded.clear()
    for template in ("y0 [[200]] x [[200]] y" * 20, '[[3:one of "ab"]] x' * 100, "[[3]]" + " y0 yes" * 9000):
        before = kept(processor)
        with pytest.raises(ValueError, match=r"dlm_template.*tokens with its end; the model's length is 256"):
            process(llm, params(template))
        assert len(encoded) <= 1 and kept(processor) == before
        encoded.clear()


REFUSED = {
    "its prompt": (params('[[9:one of "qr"]]' + "[[200]]"), {**PROMPT, "prompt_token_ids": [7] * 60}, "the prompt 60"),
    "its alternatives": (params('[[9:one of "qrs"]] [[1:one of "qrst"]]'), PROMPT, "and its hole 1"),
    "a special token": (params('[[9:one of "qrstu"]] <|endoftext|>'), PROMPT, "contains a token"),
    "another option": (params('[[9:one of "qrstuv"]]', dlm_suffix="a"), PROMPT, "dlm_suffix"),
    "its steps": (params('[[9:one of "qrstuvw"]]', dlm_steps=1, dlm_block_length=2), PROMPT, "dlm_steps"),
}


@pytest.mark.parametrize(("sampling", "prompt", "says"), REFUSED.values(), ids=REFUSED)
def test_a_refused_template_leaves_nothing(llm, processor, sampling, prompt, says):
    before = kept(processor)
    with pytest.raises(ValueError, match=re.escape(says)):
        process(llm, sampling, prompt)
    assert kept(processor) == before


def test_accepted_templates_are_kept_up_to_a_bound(llm, processor, encoded):
    own = vocabulary(processor)
    for index in range(own.layouts.bound + 5):
        process(llm, params(f'x{index} [[9:one of "x{index}"]]'))
    assert kept(processor) == (own.layouts.bound, own.alternatives.bound)
    encoded.clear()
    process(llm, params(f'x{index} [[9:one of "x{index}"]]'))
    assert not encoded
    process(llm, params(f'y [[12:one of "x{index}"]]'))  # another template with the same alternatives
    assert [text for text, _ in encoded] == ["y "]


# -- one encoding, in a thread -------------------------------------------------------------------


def handled(llm, sampling, **body):
    """What a route of a server does with a request: the model is checked, `generate` called and iterated."""
    processor = llm.llm_engine.input_processor
    engine = SimpleNamespace(input_processor=processor)
    serving = SimpleNamespace(engine_client=engine, model_config=processor.model_config)

    async def check(self, request):
        return None

    def generate(self, prompt, sampling_params, request_id, *args, **kwargs):
        async def iterated():
            yield process(llm, copy.deepcopy(sampling_params), prompt)

        return iterated()

    async def handle():
        await bodies.check_model(check)(serving, SimpleNamespace(**body))
        generator = requests.generate(generate)(engine, dict(PROMPT), sampling, "r")
        return await asyncio.create_task(anext(generator))

    return asyncio.run(handle())


TEXTS = {
    "a template": ({"dlm_template": 'one [[5]] two [[9:one of "qx"]]'}, ["one ", " two ", "qx"]),
    "a suffix": ({"dlm_suffix": " and so on"}, [" and so on"]),
    "a draft and a suffix": ({"dlm_start": "drafted", "dlm_suffix": " so"}, [" so", "drafted"]),
}


@pytest.mark.parametrize("route", ["vllm_xargs", "sampling_params"])
@pytest.mark.parametrize(("extra", "wanted"), TEXTS.values(), ids=TEXTS)
def test_texts_of_a_server_are_encoded_once_and_in_a_thread(llm, processor, encoded, extra, wanted, route):
    assert vocabulary(processor).texts and not encoded.clear()
    vocabulary(processor).layouts.clear()
    vocabulary(processor).alternatives.clear()
    sampling = SamplingParams(temperature=0, max_tokens=40, extra_args=dict(extra))
    body = {"vllm_xargs": dict(extra)} if route == "vllm_xargs" else {"sampling_params": sampling}
    request = handled(llm, sampling, **body)
    assert [text for text, _ in encoded] == wanted
    assert threading.get_ident() not in {thread for _, thread in encoded}
    # the engine gets what it gets without a server, in plain data
    alone = process(llm, sampling)
    assert request.prompt_token_ids == alone.prompt_token_ids
    assert request.sampling_params.extra_args == alone.sampling_params.extra_args
    assert all(type(value) in (str, dict) for value in request.sampling_params.extra_args.values())
    assert CANVAS_REQUEST not in sampling.extra_args


def test_a_refused_text_is_refused_by_the_route(llm, encoded):
    for extra in ({"dlm_template": "abc"}, {"dlm_suffix": "y" * HUGE}, {"dlm_template": "<|endoftext|>[[3]]"}):
        with pytest.raises(ValueError, match=next(iter(extra))):
            handled(llm, params(**extra), vllm_xargs=extra)


@pytest.mark.parametrize("extra", [{}, {"dlm_steps": 4}, {"dlm_suffix": " so"}], ids=["nothing", "an option", "a text"])
def test_a_request_of_a_server_is_parsed_and_checked_once(llm, monkeypatch, extra):
    calls = []
    for module, name in ((parsing, "request_options"), (requests, "check")):
        monkeypatch.setattr(module, name, noting(getattr(module, name), calls))
    request = handled(llm, params(**extra), vllm_xargs=dict(extra))
    assert calls == ["request_options", "check"]
    scheduler = core_of(llm).scheduler
    canvases = OpenCanvases(scheduler.vllm_config)
    canvas = canvases.open(Request.from_engine_core_request(request, None))
    assert len(canvas) == len(request.prompt_token_ids) + 8
    assert calls == ["request_options", "check"]


def noting(function, calls: list[str]):
    def noted(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return noted


def test_texts_are_encoded_once_by_llm(llm, encoded):
    process(llm, params(dlm_suffix=" and so on"))
    assert [text for text, _ in encoded] == [" and so on"]


# -- where a template ends -----------------------------------------------------------------------


@pytest.mark.parametrize("field", ["stop", "stop_token_ids"])
def test_nothing_cuts_fixed_text(llm, field):
    sampling = params("one [[4]] two [[4]]")
    setattr(sampling, field, ["two"] if field == "stop" else [9])
    for call in (lambda: process(llm, sampling), lambda: handled(llm, sampling, vllm_xargs=sampling.extra_args)):
        with pytest.raises(
            ValueError, match=f"^{field}: .* could end the answer within the fixed text of dlm_template"
        ):
            call()


def test_a_template_ends_without_the_tokenizers_end(llm, processor, monkeypatch):
    """vLLM stops at end tokens of the tokenizer, the checkpoint and the turn. Without any of them the template ends."""
    monkeypatch.setattr(processor.renderer, "get_eos_token_id", lambda: None)
    monkeypatch.setattr(processor, "generation_config_fields", {})
    monkeypatch.setattr(processor.model_config.hf_config, "eot_token_id", None, raising=False)
    sampling = SamplingParams(temperature=0, max_tokens=None, extra_args={"dlm_template": 'a[[30:one of "b"]]c'})
    (output,) = llm.generate(["Copy:"], [sampling], use_tqdm=False)
    (answer,) = output.outputs
    assert answer.text == "abc" and answer.finish_reason == "stop"
    assert len(answer.token_ids) == 4 and len(set(answer.token_ids)) == 4  # with the end
