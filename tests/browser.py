"""A headless Chromium with real mouse and keys, for tests: its debugging protocol over a pipe, without a driver."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next(filter(None, map(shutil.which, PROGRAMS)), None)
BUTTONS = {"left": 1, "right": 2, "middle": 4}
ALT, CONTROL, SHIFT = 1, 2, 8
# Chromium reads from file 3 and writes to file 4
START = """
import fcntl, os, sys
files = [fcntl.fcntl(int(file), fcntl.F_DUPFD, 100) for file in sys.argv[1:3]]
for file, number in zip(files, (3, 4)):
    os.dup2(file, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
# virtual codes of keys that are no character
CODES = {"ArrowUp": 38, "ArrowDown": 40, "PageUp": 33, "PageDown": 34}
# what Chromium answers while a page goes to another address or loads again
NAVIGATED = (
    "Inspected target navigated or closed",
    "Execution context was destroyed.",
    "Cannot find default execution context",
)


class NavigatedError(Exception):
    """The document is gone in which a script ran."""


class Browser:
    """Chromium with a folder for its files. ``close()`` ends it."""

    def __init__(self, folder: Path) -> None:
        assert PROGRAM is not None
        there, to_browser = os.pipe()
        from_browser, back = os.pipe()
        flags = ["--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-gpu"]
        flags += ["--no-first-run", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(there), str(back), PROGRAM, *flags],
            pass_fds=(there, back),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._pipe = to_browser
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.Queue] = {}
        self.pages: list[Page] = []
        self.errors: list[str] = []  # of all pages
        threading.Thread(target=self._read, args=(from_browser,), daemon=True).start()

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb") as stream:
            rest = b""
            while chunk := stream.read1(1 << 20):
                *messages, rest = (rest + chunk).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers[message["id"]].put(message)
                    elif message["method"] == "Runtime.exceptionThrown":
                        self.errors.append(json.dumps(message["params"]["exceptionDetails"])[:1000])
                    elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                        self.errors.append(message["params"]["entry"]["text"])

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = queue.Queue()
        message = {"id": number, "method": method, "params": parameters}
        os.write(self._pipe, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        answer = self._answers[number].get(timeout=120)
        if answer.get("error", {}).get("message") in NAVIGATED:
            raise NavigatedError(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str, *, width: int = 1300, height: int = 850, dark: bool = False) -> Page:
        self.pages.append(Page(self, url, width, height, dark))
        return self.pages[-1]

    def close(self) -> None:
        os.close(self._pipe)  # Chromium ends when the pipe does
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Page:
    """A tab."""

    def __init__(self, browser: Browser, url: str, width: int, height: int, dark: bool) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.go(url)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def front(self) -> None:
        """Go to this tab; Chromium does not draw the others."""
        self.call("Page.bringToFront")

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, also of a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true, also over a reload of the page."""
        end = time.monotonic() + seconds
        while not self._is(condition):
            assert time.monotonic() < end, f"{condition} was not true in {seconds} s; errors: {self.browser.errors}"
            time.sleep(0.05)

    def _is(self, condition: str) -> bool:
        try:
            return self.run(f"Boolean({condition})")
        except NavigatedError:
            return False

    def mouse(self, *points: tuple[float, float], button: str = "left", modifiers: int = 0) -> None:
        """Press a button at the first point, move over the others, and let go."""
        event = {"button": button, "clickCount": 1, "modifiers": modifiers}
        down = {**event, "buttons": BUTTONS[button]}
        self.point(*points[0])
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=points[0][0], y=points[0][1], **down)
        for x, y in points[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, **down)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=points[-1][0], y=points[-1][1], **event)

    def point(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        self.mouse(self.center(selector))

    def center(self, selector: str) -> tuple[float, float]:
        script = f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "nearest"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()"""
        x, y = self.run(script)
        return x, y

    def wheel(self, x: float, y: float, turn: float, modifiers: int = 0) -> None:
        event = {"x": x, "y": y, "deltaX": 0, "deltaY": turn, "modifiers": modifiers}
        self.call("Input.dispatchMouseEvent", type="mouseWheel", **event)

    def key(self, key: str, modifiers: int = 0, *, hold: bool = False) -> None:
        code = CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
        event = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **event)
        if not hold:
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, file: str | Path) -> None:
        Path(file).write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
