"""Schedules of canvas blocks, over every decoding there is: no step is wasted and every request ends."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from tests.engine.holes import EOS, KINDS, MASK, SIZE
from tests.engine.simulated import CONFIDENCE, Case, Run
from tests.tiers import in_turn, slow
from vllm_dlm.methods import methods
from vllm_dlm.options import OptionError, Options, request_options, server_options
from vllm_dlm.options.texts import NO_LAYOUT, Layout
from vllm_dlm.plugins.decoding.low_confidence_static import LowConfidenceStatic
from vllm_dlm.plugins.decoding.roles import ShadowingDecoding, without_speculation

#: The same examples in every run, however busy the machine is, so that a run cannot fail by chance
FIXED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
EXAMPLES = [10, *slow(50)]
SHARES = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
#: Fields of decodings, and values that change what a step fills. Others keep their defaults.
FIELDS = {
    "threshold": SHARES,
    "factor": st.sampled_from([0.1, 1.0, 3.0]),
    "kappa": SHARES,
    "tau": SHARES,
    "radius": st.integers(0, 5),
    "low": SHARES,
    "high": SHARES,
    "tau1": SHARES,
    "tau2": SHARES,
    "editing_threshold": SHARES,
    "max_post_steps": st.integers(0, 3),
    "eb_threshold": st.sampled_from([0.0, 0.5, 5.0]),
    "drafts": st.integers(1, 5),
    "algorithm_temperature": st.sampled_from([0.0, 0.7]),
    "eps": st.just(0.2),
    "threshold_decay": st.sampled_from([0.0, 0.5]),
    "beta": SHARES,
}
DECODINGS = sorted(methods("decoding"))


@pytest.fixture(autouse=True)
def no_constants_of_loaded_modules(monkeypatch):
    """Hypothesis also draws constants from the source of loaded modules, and those differ with the tests before."""
    monkeypatch.setattr(providers.HypothesisProvider, "_local_constants", providers.Constants())


@st.composite
def fields_of(draw, name: str, block_length: int | None) -> dict:
    extra = {"dlm_decoding": name, "dlm_block_length": "none" if block_length is None else block_length}
    for field, values in FIELDS.items():
        if hasattr(methods("decoding")[name], field) and draw(st.booleans()):
            extra[f"dlm_{field}"] = draw(values)
    return extra


def options_of(server: Options, extra: dict) -> Options:
    """Without fields that do not go with the others"""
    try:
        return request_options(server, extra)
    except OptionError as error:
        return options_of(server, {field: value for field, value in extra.items() if field != error.field})


@st.composite
def with_steps(draw, options: Options, blocks: int, masks: int) -> Options:
    """Some number of steps that a request may ask for: smaller than a block, or more than there are masks"""
    least = 1 if isinstance(options.decoding, LowConfidenceStatic) else blocks
    steps = draw(st.none() | st.integers(least, least + 2 * masks))
    try:
        return replace(options, decoding=replace(options.decoding, steps=steps))
    except ValueError:  # this one goes by threshold alone
        return options


@st.composite
def templates(draw) -> Layout:
    """Texts and holes in turn"""
    start, holes, kinds = [], [], list(KINDS)
    for _ in range(draw(st.integers(1, 4))):
        start += draw(st.lists(st.integers(2, SIZE - 1), max_size=3))
        length, kind = draw(st.integers(5, 20)), draw(st.integers(0, len(kinds) - 1))
        holes.append((len(start), length, kind))
        start += [MASK] * length
    start += draw(st.lists(st.integers(2, SIZE - 1), max_size=3))
    return Layout(start=start, holes=holes, automata=[KINDS[kind][0].plain() for kind in kinds], ends=[EOS])


@st.composite
def full_cases(draw, name: str) -> Case:
    server = server_options(None, "low_confidence")
    extra = draw(fields_of(name, draw(st.none() | st.integers(1, 12))))
    extra["dlm_reuse"] = draw(st.sampled_from(sorted(methods("reuse"))))
    kind, layout = draw(st.sampled_from(["plain", "template", "draft"])), NO_LAYOUT
    prompt = draw(st.lists(st.integers(1, SIZE - 1), min_size=1, max_size=20))  # 1: a mask
    if kind == "template":
        layout = draw(templates())
        max_tokens = layout.length
    else:
        max_tokens = draw(st.just(1) | st.integers(1, 40))
        prompt = [2 if token == MASK and draw(st.booleans()) else token for token in prompt]
    if kind == "draft":
        draft = draw(st.lists(st.integers(1, SIZE - 1), min_size=1, max_size=max_tokens))
        layout = Layout(start=draft, remask=draw(st.sampled_from([0.0, 0.5, 1.0])))
    else:
        extra["dlm_extent"] = draw(st.sampled_from(sorted(methods("extent"))))
        if extra["dlm_extent"] == "window":
            extra["dlm_window"] = draw(st.integers(0, 10))
    options = options_of(server, extra)
    if kind == "template":
        options = replace(options, decoding=without_speculation(options.decoding))
    # at the model's length, or below it
    most = len(prompt) + max(1, max_tokens - draw(st.integers(0, 2)) * (kind == "plain"))
    case = Case(
        options,
        tuple(prompt),
        max_tokens,
        most,
        layout,
        shift=draw(st.integers(0, 1)),
        canvases=draw(st.integers(1, 5)),
        **draw(models()),
    )
    masks = case.canvas
    count = int((masks.tokens == MASK).sum())
    return replace(case, options=draw(with_steps(options, len(masks.blocks), count)))


@st.composite
def block_causal_cases(draw, name: str) -> Case:
    width = draw(st.integers(1, 12))
    server = server_options(None, "low_confidence_static", attention="block_causal", block_length=width)
    options = options_of(server, draw(fields_of(name, width)))
    prompt = draw(st.lists(st.integers(2, SIZE - 1), min_size=1, max_size=30))
    longest = len(prompt) + draw(st.just(1) | st.integers(1, 40))
    max_tokens = draw(st.just(1) | st.integers(1, longest - len(prompt)) | st.just(longest - len(prompt)))
    case = Case(options, tuple(prompt), max_tokens, longest, **draw(models()))
    canvas = case.canvas
    count = len(canvas) - canvas.prompt_len
    return replace(case, options=draw(with_steps(options, len(canvas.blocks), count)))


@st.composite
def models(draw) -> dict:
    return {
        "seed": draw(st.integers(0, 1000)),
        "confidence": draw(st.sampled_from(sorted(CONFIDENCE))),
        "ends": draw(st.sampled_from([0.0, 0.05, 0.5])),
        "stops": draw(st.booleans()),
        "logprobs": draw(st.booleans()),
    }


def check(case: Case, data) -> None:
    run = Run(case).finish()
    canvas, longest = run.canvas, min(case.max_tokens, case.max_model_len - len(case.prompt))
    assert all(0 <= token < SIZE and token != MASK for token in run.tokens[:longest])
    if case.layout.holes:
        assert run.tokens[-1] == EOS and not (canvas.tokens[canvas.prompt_len :] == MASK).any()
    elif not case.stops:
        assert len(run.tokens) >= longest
    if case.logprobs:
        assert len(run.records) == len(run.tokens) and None not in run.records[:longest]
    if case.options.reuse.name != "none" and MASK in case.prompt:
        return  # a refresh, which a preemption adds, reads masks of the prompt that other steps do not
    for steps in ({data.draw(st.integers(0, run.forwards - 1))}, {0, 1}, {1, 3, 5}):
        again = Run(case, frozenset(steps)).finish()
        assert again.tokens == run.tokens, steps
        if case.logprobs:
            assert None not in again.records[:longest]


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", DECODINGS)
def test_full_attention(name, examples):
    @settings(FIXED, max_examples=examples)
    @given(case=full_cases(name), data=st.data())
    def holds(case, data):
        check(case, data)

    holds()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(
    "name", [name for name in DECODINGS if not issubclass(methods("decoding")[name], ShadowingDecoding)]
)
def test_block_causal(name, examples):
    @settings(FIXED, max_examples=examples)
    @given(case=block_causal_cases(name), data=st.data())
    def holds(case, data):
        check(case, data)

    holds()


@pytest.mark.parametrize("name, seed", in_turn(["entropy", "low_confidence", "credit", "random"], list(range(4))))
def test_holes_that_end_early_take_no_steps(name, seed):
    """Each step fills one position, and positions after the end of a hole take no step."""
    (string,) = [index for index, kind in enumerate(KINDS) if kind == "string"]
    start = [MASK] * 8 + [2] + [MASK] * 200 + [3]
    layout = Layout(
        start=start,
        holes=[(0, 8, string), (9, 200, string)],
        ends=[EOS],
        automata=[automaton.plain() for automaton, _ in KINDS.values()],
    )
    options = request_options(server_options(None, name), {"dlm_block_length": "none"})
    run = Run(Case(options, (5,), layout.length, 300, layout, seed=seed, ends=0.3)).finish()
    written = run.canvas.tokens[1:] != EOS
    assert run.forwards <= written.sum() - 2 + run.ended


def test_the_rest_of_a_schedule_is_even():
    """Two of 8 steps are made when 10 of 24 masks are filled at once: the other 14 are split among 6 steps."""
    options = request_options(server_options(None, "low_confidence"), {"dlm_steps": 8})
    state = (run := Run(Case(options, (5,), 32, 64))).state
    run.step()
    run.step()
    assert state.filled == 8 and state.quotas == [4] * 8
    state.canvas.tokens[state.canvas.candidates()[:10]] = 2
    state.filled += 10
    state._adjust_schedule()
    assert state.filled == 8 and state.quotas == [4, 4, 3, 3, 2, 2, 2, 2]


class TestStartingTexts:
    """`wino` judges what stands, whatever became a mask of it."""

    @staticmethod
    def case(remask: float, length: int = 60, **fields) -> Case:
        options = request_options(server_options(None, "wino"), fields)
        layout = Layout(start=[2 + index % 9 for index in range(length)], remask=remask)
        return Case(options, (5,), length, length + 1, layout, confidence="sure of few")

    @pytest.mark.parametrize("remask", [0.0, 0.02, 0.05, 0.5])
    @pytest.mark.parametrize("width", [7, 60])
    @pytest.mark.parametrize("reuse", ["none", "fast_dllm"])
    @pytest.mark.parametrize("shift", [0, 1])
    def test_judged(self, remask, width, reuse, shift):
        case = self.case(remask, dlm_tau2=1.0, dlm_block_length=width, dlm_reuse=reuse)
        run = Run(replace(case, shift=shift)).finish()
        assert run.revoked and run.tokens != list(case.layout.start)

    def test_kept_if_nothing_is_doubted(self):
        case = self.case(0.0, dlm_tau2=0.0)
        run = Run(case).finish()
        assert run.tokens == list(case.layout.start) and run.forwards == 2  # one reads, one judges
