"""What tests do on the page, as a person would."""

CANVAS = 40
A, B = "#policies fieldset:nth-child(1)", "#policies fieldset:nth-child(2)"
RUNS = ("#runs article:nth-child(1)", "#runs article:nth-child(2)")
POLICIES = ({"dlm_decoding": "wino"}, {"dlm_reuse": "fast_dllm", "dlm_selection": "unique", "dlm_threshold": 0.9})
REFUSED = "Failed to load resource: the server responded with a status of "


def fill(page, selector: str, text: str) -> None:
    page.click(selector)
    page.evaluate(f"document.querySelector('{selector}').select()")
    page.write(text)


def run(page, prompt: str = "Why is the sky blue?", tokens: int = 40, compare: bool = False) -> None:
    fill(page, "#prompt", prompt)
    fill(page, "#max-tokens", str(tokens))
    if compare:
        page.click("#compare")
        page.choose(f"{A} [data-option=decoding]", "wino")
        page.choose(f"{B} [data-option=reuse]", "fast_dllm")
        page.choose(f"{B} [data-option=selection]", "unique")
        fill(page, f"{B} [data-option=dlm_threshold]", "0.9")
    page.click("#start")
    finished(page)


def give_key(page, key: str) -> None:
    """When it is asked for"""
    page.until("document.querySelector('#key-dialog').open")
    page.write(key)
    page.press("Enter")


def finished(page) -> None:
    page.until("document.querySelector('#stop').hidden && /tokens in|stopped|ended|broke/.test(said.textContent)")


def cells(page, run: str = RUNS[0]) -> list[tuple[str, str]]:
    """(classes, text) of each position"""
    found = page.evaluate(
        f"[...document.querySelectorAll('{run} .canvas .cell')].map((c) => [c.className, c.textContent])"
    )
    return [(names, text) for names, text in found]


def slide(page, place: int) -> None:
    page.evaluate(f"(() => {{ moment.value = {place}; moment.dispatchEvent(new Event('input')); }})()")


def place(page) -> int:
    return page.evaluate("Number(moment.value)")


def figures(page, run: str = RUNS[0]) -> dict[str, str]:
    return page.evaluate(
        f"Object.fromEntries([...document.querySelectorAll('{run} [data-figure]')]"
        ".map((one) => [one.dataset.figure, one.querySelector('dd').textContent]))"
    )


def written(frames: list[dict], steps: int | None = None) -> dict[int, str]:
    """position -> what stands there after so many steps, said as simply as can be"""
    there = {position: text for position, _, text in frames[0]["begin"]["given"]}
    for frame in frames[1:-1]:
        if steps is not None and frame["step"] > steps:
            break
        for position, _ in frame.get("unset", []):
            del there[position]
        for position, _, text, *_ in frame["set"] + frame.get("edited", []):
            there[position] = text
    return there


def shown(text: str) -> str:
    return "eot_id" if text == "<|eot_id|>" else text.replace("\n", "↵\n")
