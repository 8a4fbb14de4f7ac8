"""Two policies side by side, the replay, and the file it is exported to."""

from tests.view import synthetic
from tests.view.pages import (
    CANVAS,
    POLICIES,
    REFUSED,
    RUNS,
    cells,
    figures,
    fill,
    finished,
    give_key,
    place,
    run,
    slide,
    written,
)


def test_two_policies_on_one_prompt(visit, server):
    page = visit()
    run(page, tokens=CANVAS, compare=True)
    assert [one["vllm_xargs"] for one in server.asked] == [policy | {"dlm_frames": 1} for policy in POLICIES]
    both = [synthetic.frames(CANVAS, policy) for policy in POLICIES]
    for moment in (CANVAS + 9, 8):  # beyond the end of both, and before it
        slide(page, moment)
        there = [written(frames, moment) for frames in both]
        differ = {i for i in there[0].keys() & there[1].keys() if there[0][i] != there[1][i]}
        assert differ or moment == 8
        for name in RUNS:
            assert {i for i, (names, _) in enumerate(cells(page, name)) if "differs" in names} == differ
        assert f"{len(differ)} position" in page.text("#legend")
    assert page.text(f"{RUNS[0]} h2") == "Awino"
    assert page.text(f"{RUNS[1]} h2") == "Bfast_dllm + unique + threshold 0.9"
    read, of = (sum(frame["keys"][name] for frame in both[1][1:9]) for name in ("read", "of"))
    assert figures(page, RUNS[1])["keys"] == f"{100 * read / of:.0f} %"


def test_one_slider_for_both_along_steps_and_along_time(visit):
    page = visit()
    run(page, tokens=CANVAS, compare=True)
    both = [synthetic.frames(CANVAS, policy) for policy in POLICIES]
    slide(page, 6)
    assert [figures(page, name)["steps"] for name in RUNS] == ["6", "6"]
    page.choose("#unit", "time")
    # 20 ms a step, and 20 ms / √3: at the sixth of the first the second has made ten
    assert [figures(page, name)["steps"] for name in RUNS] == ["6", "10"]
    slide(page, 999)
    assert [figures(page, name)["steps"] for name in RUNS] == [str(frames[-1]["end"]["steps"]) for frames in both]
    assert page.text("#at").endswith("s")


def test_while_a_run_goes_on_its_past_can_be_looked_at(visit, server):
    server.holds_at = 8
    page = visit()
    fill(page, "#prompt", "Why?")
    page.click("#start")
    page.until("Number(moment.max) === 7")
    assert place(page) == 7
    slide(page, 2)
    server.go.set()
    finished(page)
    assert page.evaluate("Number(moment.max)") > 7
    assert place(page) == 2


def test_the_export_replays_from_a_file(visit, exported, server):
    server.key = "secret-key"
    page = visit()
    page.expected = [REFUSED + "401"]
    give_key(page, "secret-key")
    page.until("model.textContent === 'mock'")
    run(page, f"Say {synthetic.EVIL}", CANVAS, compare=True)
    file = exported(page)
    assert "secret-key" not in file.read_text()
    there = visit(file.as_uri())
    assert there.requests == [file.as_uri()] or all(
        one.startswith("data:") for one in set(there.requests) - {file.as_uri()}
    )
    assert there.evaluate("document.images.length + document.querySelectorAll('#ask').length") == 0
    assert there.text("#question") == f"Say {synthetic.EVIL}"
    last = page.evaluate("Number(moment.max)")
    for moment in (last, last // 2):
        slide(page, moment)
        slide(there, moment)
        for name in RUNS:
            assert cells(there, name) == cells(page, name)
            assert figures(there, name) == figures(page, name)
    slide(there, last - 3)
    there.click("#play")
    there.until(f"moment.value === '{last}' && !play.classList.contains('on')")


def test_the_export_of_a_run_that_failed(visit, exported, server):
    server.ends_early = True
    page = visit()
    run(page, tokens=CANVAS)
    assert "ended early" in page.text("#trouble")
    there = visit(exported(page).as_uri())
    assert cells(there)[0][0] == "cell mask"
    slide(there, 999)
    assert cells(there) == cells(page)
    assert "ended early" in there.text(".failure")
