"""Drives a headless Chromium over the DevTools protocol, using only the standard library.

Used for tests and pictures of the live view. The browser is controlled through a pipe, can reach only 127.0.0.1, and
keeps its profile in a temporary folder.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--mute-audio", "--hide-scrollbars", "--force-color-profile=srgb"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
KEYS = {" ": ("Space", 32), "Tab": ("Tab", 9), "Enter": ("Enter", 13), "Escape": ("Escape", 27)} | {
    name: (name, code) for name, code in (("ArrowLeft", 37), ("ArrowUp", 38), ("ArrowRight", 39), ("ArrowDown", 40))
}


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class BrowserError(Exception):
    pass


class Browser:
    """A browser process that runs within `with`."""

    def __init__(self, program: str):
        self.program = program
        self.rest, self.count = b"", 0
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory(prefix="vllm_dlm-browser-", ignore_cleanup_errors=True)
        reads, self.sends = os.pipe()
        self.gets, writes = os.pipe()
        command = [self.program, *FLAGS, f"--user-data-dir={self.folder.name}"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium's sandbox does not work as root
        # Chromium reads from file descriptor 3 and writes to 4. A shell redirects the pipes there.
        shell = f'exec "$@" 3<&{reads} 4>&{writes}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "browser", *command],
            pass_fds=(reads, writes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        return self

    def __exit__(self, *_) -> None:
        try:
            self.call("Browser.close", timeout=10)
            self.process.wait(10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.sends)
        os.close(self.gets)
        self.folder.cleanup()

    def call(self, method: str, session: str | None = None, timeout: float = 60, **parameters) -> dict[str, Any]:
        self.count += 1
        number = self.count
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.sends, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            answer = self.receive(end - time.monotonic())
            if answer and answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
        raise BrowserError(f"{method}: no answer in {timeout:.0f} s")

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """Returns the next message, or None after the timeout. Passes events on to their pages."""
        end = time.monotonic() + timeout
        while b"\0" not in self.rest:
            if not select.select([self.gets], [], [], max(0, end - time.monotonic()))[0]:
                return None
            data = os.read(self.gets, 1 << 20)
            if not data:
                raise BrowserError("the browser has exited")
            self.rest += data
        first, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(first)
        if page := self.pages.get(message.get("sessionId", "")):
            page.happened(message)
        return message

    def open(self, url: str, width: int = 1200, height: int = 900, dark: bool = False, ratio: float = 1) -> "Page":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.resize(width, height, ratio)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call(
            "Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
        )
        page.call("Page.navigate", url=url)
        page.until("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    def keep_downloads(self, folder: Path) -> None:
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))


class Page:
    """A tab. `requests`: URLs it has requested; `errors`: errors and warnings of its console and of the browser."""

    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target
        self.requests: list[str] = []
        self.errors: list[str] = []

    def call(self, method: str, **parameters) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def happened(self, message: dict[str, Any]) -> None:
        what, told = message.get("method"), message.get("params", {})
        if what == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif what == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif what == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(one.get("value")) for one in told["args"]))
        elif what == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def resize(self, width: int, height: int, ratio: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=False
        )

    def evaluate(self, expression: str) -> Any:
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise BrowserError(f"{expression}: {told['exceptionDetails'].get('exception', {}).get('description')}")
        return told["result"].get("value")

    def until(self, expression: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise BrowserError(f"not in {timeout:.0f} s: {expression}\n{self.errors}")
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def click(self, selector: str) -> None:
        """Clicks the center of an element, after scrolling it into view."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def place(self, selector: str) -> tuple[float, float]:
        found = self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = found.getClientRects()[0];"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return found[0], found[1]

    def write(self, text: str) -> None:
        """Types text into the focused element."""
        self.call("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Chooses an option of a select element, after waiting until it has that option."""
        options = f"[...document.querySelector({json.dumps(selector)}).options]"
        self.until(f"{options}.some((option) => option.value === {json.dumps(value)})")
        self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            f"found.value = {json.dumps(value)};"
            "found.dispatchEvent(new Event('change', {bubbles: true})); return found.value; })()"
        )

    def press(self, key: str, times: int = 1, shift: bool = False) -> None:
        code, number = KEYS[key]
        text = {"text": " "} if key == " " else {"text": "\r"} if key == "Enter" else {}
        parameters = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", **parameters, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **parameters)

    def picture(self, path: Path) -> None:
        self.call("Page.bringToFront")  # a background tab may not be painted
        told = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(told["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
        del self.browser.pages[self.session]


def eventually(true: Callable[[], Any], timeout: float = 60) -> Any:
    """Calls `true` until its result is truthy, and returns the result."""
    end = time.monotonic() + timeout
    while not (result := true()):
        if time.monotonic() > end:
            raise BrowserError(f"not in {timeout:.0f} s: {true}")
        time.sleep(0.05)
    return result
