"""The page for people with a keyboard, a screen reader, a telephone, a dark room."""

import pytest

from tests.view.pages import CANVAS, finished, place, run


def focused(page) -> str:
    return page.evaluate(
        "document.activeElement.id || document.activeElement.dataset.option || document.activeElement.className"
    )


def test_the_keyboard_alone_will_do(visit, server):
    page = visit()
    page.until("document.querySelectorAll('[data-option=reuse] option').length > 1")
    order = []
    while not order or order[-1] != "compare":
        page.press("Tab")
        order.append(focused(page))
        assert len(order) < 30
        width = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert width != "none", f"{order[-1]}: nobody sees where the focus is"
    assert order[:3] == ["prompt", "decoding", "reuse"]
    page.press("Tab", len(order) - 1, shift=True)
    assert focused(page) == "prompt"
    page.write("Why?")
    page.press("Tab", order.index("start"))
    page.press("Enter")
    finished(page)
    assert len(server.asked) == 1
    while focused(page) != "canvas":
        page.press("Tab")
    page.press("ArrowRight", 3)
    assert "position 3" in page.text(".token")
    active = page.evaluate("document.activeElement.getAttribute('aria-activedescendant')")
    assert (
        page.evaluate(f"document.getElementById('{active}').getAttribute('aria-label')").split(", ")[1] == "position 3"
    )
    last = page.evaluate("Number(moment.max)")
    assert place(page) == last  # of tokens, not of the replay
    page.press("Tab")
    page.press("Tab")
    assert focused(page) == "moment"
    page.press("ArrowLeft", 2)
    assert place(page) == last - 2
    page.press("ArrowRight")
    assert place(page) == last - 1
    page.press(" ")
    page.until(f"moment.value === '{last}'")
    page.press(" ")
    assert page.evaluate("play.getAttribute('aria-label')") == "Pause"
    page.press(" ")
    assert page.evaluate("play.getAttribute('aria-label')") == "Play"
    assert place(page) < last


def test_space_and_arrows_keep_their_meaning_in_fields(visit):
    page = visit()
    run(page, "a", CANVAS)
    last = place(page)
    page.click("#prompt")
    page.press(" ")
    page.press("ArrowLeft")
    assert page.evaluate("document.querySelector('#prompt').value") == "a "
    assert place(page) == last


def test_those_who_listen_are_told_the_beginning_and_the_end(visit, server):
    page = visit()
    page.evaluate(
        "window.heard = []; new MutationObserver(() => heard.push(said.textContent))"
        ".observe(document.querySelector('#said'), {childList: true}); 0"
    )
    run(page, tokens=CANVAS)
    heard = page.evaluate("heard")
    assert heard[0] == "Started."
    assert heard[1:] == [f"{CANVAS} tokens in 39 steps and 0.8 seconds."]
    live = page.evaluate(
        "[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map((one) => one.id)"
    )
    assert live == ["trouble", "said"]
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, [role=listbox], [role=img]')]"
        ".filter((one) => one.getClientRects().length"
        " && !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim()))"
        ".map((one) => one.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_it_fits(visit, width, dark):
    page = visit(width=width, height=800, dark=dark)
    overflow = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth"
    assert page.evaluate(overflow) <= 0
    run(page, tokens=CANVAS, compare=True)
    assert page.evaluate(overflow) <= 0
    out = page.evaluate(
        "[...document.querySelectorAll('main *')].filter((one) => one.getClientRects().length"
        " && !one.closest('.unseen, legend') && one.getBoundingClientRect().right > innerWidth + 1)"
        ".map((one) => one.outerHTML)"
    )
    assert out == []
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input:not([type=checkbox])')]"
        ".filter((one) => one.getClientRects().length && one.getBoundingClientRect().height < 32).map((one) => one.id)"
    )
    assert small == []  # of fingers
    box = page.evaluate("(() => { const box = replay.getBoundingClientRect(); return [box.top, box.bottom]; })()")
    assert box[0] >= 0
    assert box[1] <= 800  # wherever one is


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_colour(visit, dark):
    """WCAG's contrast of 4.5 between text and what is behind it, for the first step to the last."""
    page = visit(dark=dark)
    run(page, tokens=CANVAS)
    contrasts = page.evaluate("""(() => {
        const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const light = (colour) => {
            pen.fillStyle = colour;
            pen.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
                .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const ratio = (one, other) => {
            const [dim, bright] = [light(one), light(other)].sort((a, b) => a - b);
            return (bright + 0.05) / (dim + 0.05);
        };
        const style = (one) => getComputedStyle(one);
        const sheet = style(document.querySelector('.canvas')).backgroundColor;
        const paper = style(document.body).backgroundColor;
        const cells = [...document.querySelectorAll('.canvas .cell.set')].map((cell) =>
            [cell.getAttribute('aria-label'), ratio(style(cell).color, style(cell).backgroundColor)]);
        const quiet = ['.facts', '.figures dt', '#legend', '.field', '.token'].map((name) =>
            [name, ratio(style(document.querySelector(name)).color, paper)]);
        return [...cells, ...quiet, ['given', ratio(style(document.querySelector('.given')).color, sheet)]];
    })()""")
    assert len(contrasts) == CANVAS - 1 + 6
    assert [pair for pair in contrasts if pair[1] < 4.5] == []
