"""A real browser for the tests of pages: headless Chromium, spoken to through a pipe.

The DevTools protocol is one JSON message after another, each ended by a zero byte:
https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"Enter": 13, "Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


def find_browser() -> str:
    """The path of a Chromium on this machine, or ""."""
    return next(filter(None, map(shutil.which, NAMES)), "")


class Browser:
    """One page in a headless Chromium; `errors` collects what the page complained about."""

    def __init__(self, width: int = 1200, dark: bool = False):
        self.profile, self.errors, self.buffer, self.count = tempfile.mkdtemp(), [], b"", 0
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        # the protocol's pipe is file descriptors 3 and 4
        command = (f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" --headless --no-sandbox '
                   "--disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
                   '--remote-debugging-pipe --user-data-dir="$1" about:blank')
        self.process = subprocess.Popen(
            ["bash", "-c", command, find_browser(), self.profile], pass_fds=(to_browser,
             from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.session = None
        (page,) = [one for one in self.call("Target.getTargets")["targetInfos"]
                   if one["type"] == "page"]
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"],
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        os.close(self.write_end)
        os.close(self.read_end)
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def receive(self, seconds: float = 60.0) -> dict:
        """The next message; what tells of an error is noted."""
        until = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self.read_end, 1 << 20) if ready else b""
            assert data, "the browser said nothing"
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        if message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(message["params"])
        url = message.get("params", {}).get("request", {}).get("url", "file:")
        if message.get("method") == "Network.requestWillBeSent" and not url.startswith("file:"):
            self.errors.append(message["params"])
        return message

    def call(self, method: str, **parameters) -> dict:
        """Call a method of the protocol and wait for its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, path) -> None:
        """Open a file and wait until it is loaded."""
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str):
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key as a person would."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=KEYS[key], **(text if kind == "keyDown" else {}))

    def point(self, selector: str, click: bool = False) -> None:
        """Move the pointer over the first element of a CSS selector, and perhaps click."""
        x, y = self.run(f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                        "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
                        "return [r.x + r.width / 2, r.y + r.height / 2]; })()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path) -> None:
        """The whole page as a PNG."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(picture["data"]))
