"""The page in a browser, against a server that sends known frames: what is asked, and what is seen of the answer."""

from tests.view import synthetic
from tests.view.pages import CANVAS, POLICIES, RUNS, A, B, cells, figures, fill, run, shown, slide, written


def test_a_prompt_is_typed_and_its_canvas_fills(visit, server):
    page = visit()
    run(page, "Why?\nSay it.", CANVAS)
    (asked,) = server.asked
    assert asked["messages"] == [{"role": "user", "content": "Why?\nSay it."}]
    assert (asked["model"], asked["stream"], asked["max_tokens"]) == ("mock", True, CANVAS)
    assert asked["vllm_xargs"] == {"dlm_frames": 1}
    frames = synthetic.frames(CANVAS, {})
    assert [text for _, text in cells(page)] == [shown(text) for _, text in sorted(written(frames).items())]
    steps = frames[-1]["end"]["steps"]
    assert figures(page) == {"speed": "51", "steps": str(steps), "rows": "100 %", "keys": "100 %"}
    assert page.text("#question") == "Why?\nSay it."
    assert page.evaluate("document.images.length") == 0  # what a model writes is text


def test_every_moment_of_it(visit):
    page = visit()
    page.choose(f"{A} [data-option=decoding]", "wino")
    run(page, tokens=CANVAS)
    frames = synthetic.frames(CANVAS, POLICIES[0])
    for moment in (0, 1, 3, 4, 5, 20):
        slide(page, moment)
        there, now = written(frames, moment), cells(page)
        guesses = {guess[0]: guess[1] for guess in frames[moment].get("guesses", [])} if moment else {}
        for position in range(CANVAS):
            names, text = now[position]
            if position in there:
                assert text == shown(there[position])
                assert names.split()[1] == ("given" if position == 2 else "set")
            elif position in guesses:
                assert (names.split()[1], text) == ("guess", shown(guesses[position]))
            else:
                assert (names.split()[1], text) == ("mask", "")
        assert page.text("#at").startswith(f"{moment} / ")
    slide(page, 4)
    ((taken, _),) = frames[4]["unset"]
    assert "taken" in cells(page)[taken][0]
    slide(page, 5)
    ((edited, *_),) = frames[5]["edited"]
    assert "edited" in cells(page)[edited][0]
    assert cells(page)[edited][1] == " edited"


def test_holes_of_a_prompt_are_filled_in_their_place(visit):
    page = visit()
    fill(page, f"{A} .wide input", '{"dlm_infill": 1}')
    run(page, tokens=CANVAS)
    there = cells(page)
    assert len(there) == synthetic.PROMPT + CANVAS
    frames = synthetic.frames(CANVAS, {"dlm_infill": 1})
    for index, (names, text) in enumerate(there):
        position = index - synthetic.PROMPT
        if position in (synthetic.HOLE, *range(CANVAS)):
            assert text == shown(written(frames)[position])
        else:
            assert (names, text) == ("cell given", f" p{index}")
    slide(page, 0)
    assert [i - synthetic.PROMPT for i, (names, _) in enumerate(cells(page)) if "mask" in names] == [
        synthetic.HOLE,
        0,
        1,
        *range(3, CANVAS),
    ]


def test_merged_frames_are_those_they_were_merged_of(visit, server):
    """But for guesses, of which there are those of the last step, and for sums, which are shared out evenly."""
    seen = {}
    page = visit()
    page.choose(f"{A} [data-option=decoding]", "wino")
    for merge in (1, 4):
        server.merge = merge
        run(page, tokens=CANVAS)
        seen[merge] = [cells(page), figures(page)]
        for moment in (4, 8, 10, 17):
            slide(page, moment)
            assert figures(page)["steps"] == str(moment)
            filled = [(i, names, text) for i, (names, text) in enumerate(cells(page)) if "guess" not in names]
            seen[merge].append([one for one in filled if one[1] != "cell mask"])
    assert seen[1] == seen[4]


def test_a_token_tells_what_is_known_of_it(visit):
    page = visit()
    run(page, tokens=CANVAS)
    frames = synthetic.frames(CANVAS, {})
    (position, _, text, probability, step) = next(frame["set"][0] for frame in frames if frame.get("step") == 9)
    page.hover(f".canvas .cell:nth-child({position + 1})")
    told = page.text(".token")
    assert text.strip() in told
    assert f"position {position}" in told
    assert f"step {step}" in told
    assert f"{100 * probability:.0f} %" in told or f"{100 * probability:.1f} %" in told
    assert "maybe" in told
    assert "<b>" in told
    page.hover("h1")
    assert "maybe" not in page.text(".token")
    page.click(f".canvas .cell:nth-child({position + 1})")
    page.hover("h1")
    assert "maybe" in page.text(".token")  # tapped: it stays
    page.hover(".canvas .cell:nth-child(3)")
    assert "given" in page.text(".token")


def test_heat_maps_show_what_the_frames_say(visit):
    """Colours are read from the picture at places that the frames speak of."""
    page = visit()
    page.expected = ["Canvas2D: Multiple readback"]
    run(page, tokens=48, compare=True)
    frames = synthetic.frames(48, POLICIES[1])
    prompt = synthetic.PROMPT
    read = f"""((kind, step, position) => {{
        const canvas = document.querySelectorAll('{RUNS[1]} .heat canvas')[kind];
        const [left, top, right, bottom] = [38, 18, 10, 20];
        const steps = {max(f[-1]["end"]["steps"] for f in (frames, synthetic.frames(48, POLICIES[0])))};
        const x = left + (position + 0.5 + {prompt}) * (canvas.clientWidth - left - right) / {prompt + 48};
        const y = top + (step - 0.5) * (canvas.clientHeight - top - bottom) / steps;
        return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3);
    }})"""
    seen: dict[float, set] = {}
    for kind, name in enumerate(("rows", "pages")):
        for step in (2, 7, 11):
            for position in (-20, -4, 3, 20, 45):
                runs = frames[step]["heat"][name]
                share = next((run[2] for run in runs if run[0] <= position <= run[1]), 0)
                seen.setdefault(share, set()).add(tuple(page.evaluate(f"{read}({kind}, {step}, {position})")))
    assert {0, 0.25, 0.5, 1.0} == set(seen)
    assert all(len(colours) == 1 for colours in seen.values()), seen
    light = [sum(next(iter(seen[share]))) for share in sorted(seen)]
    assert light == sorted(light, reverse=True)
    assert len(set(light)) == 4
    assert page.evaluate(f"document.querySelectorAll('{RUNS[0]} .heat')[1].hidden")  # nothing was selected
    page.evaluate(
        f"(() => {{ const canvas = document.querySelector('{RUNS[1]} .heat canvas');"
        "const box = canvas.getBoundingClientRect();"
        "canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 40, clientY: box.top + 19})); })()"
    )
    assert page.text(f"{RUNS[1]} .readout") == f"step 1, position -{prompt}: 100 %"
    label = page.evaluate(f"document.querySelector('{RUNS[1]} .heat canvas').getAttribute('aria-label')")
    assert "% of the layers in all" in label


def test_options_are_those_that_the_server_offers(visit):
    page = visit()
    page.until(f"document.querySelectorAll('{B} [data-option=extent] option').length > 1")
    offered = page.evaluate(
        f"[...document.querySelectorAll('{B} [data-option=decoding] option')].map((o) => o.textContent)"
    )
    assert offered == ["low_confidence", "low_confidence/fast", "wino"]
    assert page.evaluate(f"document.querySelector('{A} [data-option=dlm_block_length]').placeholder") == "12"
