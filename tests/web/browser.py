"""A headless Chromium for tests, spoken to in the DevTools protocol through a pipe: real keys, real clicks, no package.

The protocol's messages are JSON that ends in a zero byte; the browser reads them from descriptor 3 and writes to 4.
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
_PLACE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
_LIMIT_S = 60.0
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "Backspace": 8, "Space": 32, "ArrowLeft": 37, "ArrowRight": 39}
_TEXTS = {"Enter": "\r", "Space": " "}
ALT, CTRL, SHIFT = 1, 2, 8

# The first element of a selector that is shown and, where words are given, is called so.
_FIND = """
globalThis.find = (selector, words) => [...document.querySelectorAll(selector)].find((one) =>
  one.checkVisibility() && (!words || (one.getAttribute("aria-label") ?? one.textContent).trim() === words));
"""


class Browser:
    """A running Chromium."""

    def __init__(self, process: subprocess.Popen[bytes], out: int, into: int) -> None:
        self._process, self._out, self._into = process, out, into
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its result. Fails with the browser's words if it refuses."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{method}: {answer['error']}"
            result: dict[str, Any] = answer["result"]
            return result

    def wait_event(self, method: str, session: str, since: int) -> None:
        """Read until an event has come; `since` is how many were there before it could."""
        while not any((e["method"], e.get("sessionId")) == (method, session) for e in self.events[since:]):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._into], [], [], _LIMIT_S)
            assert ready, f"the browser said nothing for {_LIMIT_S:.0f} s"
            data = os.read(self._into, 1 << 20)
            assert data, f"the browser ended: {self._process.poll()}"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def new_page(self, url: str) -> Page:
        """A page in a storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, context, url)


class Page:
    """One tab, with the eyes and hands of whoever uses it."""

    def __init__(self, browser: Browser, session: str, context: str, url: str) -> None:
        self._browser, self._session, self.context = browser, session, context
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=_FIND)
        self.size(1280, 860)
        self._load("Page.navigate", url=url)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, for this page."""
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        """Close it and drop its storage."""
        self._browser.call("Target.disposeBrowserContext", browserContextId=self.context)

    def js(self, expression: str) -> Any:
        """The value of an expression, promises awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        found = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in found, f"{expression}\n{found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + _LIMIT_S
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.02)

    def wait_for(self, selector: str, words: str = "") -> None:
        """Until such an element is shown."""
        self.wait(f"find({json.dumps(selector)}, {json.dumps(words)})")

    def shown(self, selector: str, words: str = "") -> bool:
        """Whether such an element is shown."""
        return bool(self.js(f"Boolean(find({json.dumps(selector)}, {json.dumps(words)}))"))

    def text(self, selector: str) -> str:
        """What the first shown element of a selector says."""
        return str(self.js(f"find({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        """What all shown elements of a selector say."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].filter((one) => one.checkVisibility())"
        return list(self.js(f"{found}.map((one) => one.innerText.trim())"))

    def click(self, selector: str, words: str = "") -> None:
        """Click the middle of an element; fails if something else lies there."""
        self.wait_for(selector, words)
        place = self.js(
            f"""(() => {{
              const one = find({json.dumps(selector)}, {json.dumps(words)});
              one.scrollIntoView({{ block: "nearest" }});
              const {{ x, y, width, height }} = one.getBoundingClientRect();
              const [left, top] = [x + width / 2, y + height / 2];
              const there = document.elementFromPoint(left, top);
              return {{ x: left, y: top, hit: Boolean(there) && (one.contains(there) || there.contains(one)) }};
            }})()"""
        )
        assert place["hit"], f"{selector} {words} is covered"
        where = {"x": place["x"], "y": place["y"], "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **where)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **where)

    def type(self, text: str) -> None:
        """Type into what has the focus, in place of what is selected."""
        self.call("Input.insertText", text=text)

    def fill(self, selector: str, text: str) -> None:
        """Click a field and type over what it holds."""
        self.click(selector)
        self.press("a", CTRL)
        self.press("Backspace")
        self.type(text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        code = _KEYS.get(key) or ord(key.upper())
        about = {"key": " " if key == "Space" else key, "code": key if key in _KEYS else f"Key{key.upper()}"}
        about |= {"windowsVirtualKeyCode": code, "modifiers": modifiers}
        text = {"text": _TEXTS[key]} if key in _TEXTS else {}
        commands = {"commands": ["selectAll"]} if (key, modifiers) == ("a", CTRL) else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about, **text, **commands)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select element."""
        self.js(
            f"(() => {{ const one = find({json.dumps(selector)}); one.value = {json.dumps(value)};"
            "one.dispatchEvent(new Event('change', { bubbles: true })); })()"
        )

    def reload(self) -> None:
        """Load it again."""
        self._load("Page.reload")

    def _load(self, method: str, **params: Any) -> None:
        since = len(self._browser.events)
        self.call(method, **params)
        self._browser.wait_event("Page.loadEventFired", self._session, since)

    def size(self, width: int, height: int) -> None:
        """Resize the window."""
        about = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **about)

    def scheme(self, name: str) -> None:
        """What the system prefers: light or dark, and as little motion as possible."""
        wishes = {"prefers-color-scheme": name, "prefers-reduced-motion": "reduce"}
        features = [{"name": wish, "value": value} for wish, value in wishes.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def shot(self, file: Path) -> None:
        """A picture of it."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def problems(self) -> list[str]:
        """Uncaught exceptions and errors on the console since the last call."""
        self.js("0")
        kept, found = [], []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                kept.append(event)
            elif event["method"] == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        self._browser.events = kept
        return found


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    assert CHROMIUM is not None
    # away from 3 and 4, which the new process takes them for
    pairs = [tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe()) for _ in range(2)]
    (its_in, out), (into, its_out) = pairs
    command = [sys.executable, "-c", _PLACE, str(its_in), str(its_out), CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(its_in)
    os.close(its_out)
    try:
        browser = Browser(process, out, into)
        yield browser
        browser.call("Browser.close")
        process.wait(20)
    finally:
        process.kill()
        process.wait()
        os.close(out)
        os.close(into)
