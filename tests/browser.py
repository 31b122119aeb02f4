"""A real browser for tests: headless Chromium, driven over its own debugging pipe, so that no
driver and no package is needed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,800",
    "--remote-debugging-pipe",
)
REQUIRE = "CIRCUITS_REQUIRE_BROWSER"
PATIENCE = 60.0
# Chromium reads commands from file descriptor 3 and answers on 4.
LAUNCH = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(reads, 3), os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str:
    """The path of a Chromium; without one the test is skipped, or fails where
    CIRCUITS_REQUIRE_BROWSER=1 says that it must run.
    """
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = (
            "no Chromium found; get one, for example with apt-get install chromium chromium-driver"
        )
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{message} ({REQUIRE}=1 is set)")
        pytest.skip(message)
    return found


class Browser:
    """A running Chromium with one page, and what that page did: messages, errors, requests."""

    def __init__(self, folder: Path) -> None:
        commands_read, self._commands = os.pipe()
        self._answers, answers_write = os.pipe()
        words = [
            sys.executable,
            "-c",
            LAUNCH,
            str(commands_read),
            str(answers_write),
            find_chromium(),
            *FLAGS,
        ]
        self.profile = tempfile.mkdtemp(dir=folder)
        words += [f"--user-data-dir={self.profile}", "about:blank"]
        self._process = subprocess.Popen(
            words,
            pass_fds=(commands_read, answers_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_read)
        os.close(answers_write)
        fcntl.fcntl(self._answers, fcntl.F_SETFL, os.O_NONBLOCK)
        self._received, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        self._attach()

    def _attach(self) -> None:
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(1280, 800)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its answer."""
        self._number += 1
        number = self._number
        message = {
            "id": number,
            "method": method,
            "params": parameters,
            **({"sessionId": self.session} if self.session else {}),
        }
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._next(deadline)
            if answer.get("id") != number:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            result: dict[str, Any] = answer["result"]
            return result

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            if time.monotonic() > deadline:
                raise TimeoutError("Chromium does not answer")
            try:
                part = os.read(self._answers, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            if not part:
                raise RuntimeError("Chromium ended")
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    # Pages

    def open(self, address: str | Path) -> None:
        """Load an address or file, and wait until the page says that it is ready."""
        self.events.clear()
        self.call("Page.navigate", url=address.as_uri() if isinstance(address, Path) else address)
        self.wait("document.body?.dataset.ready === 'true' && document.readyState === 'complete'")

    def reload(self) -> None:
        """Load the page anew."""
        self.js("document.body.dataset.ready = 'old'")
        self.call("Page.reload")
        self.wait("document.body?.dataset.ready === 'true' && document.readyState === 'complete'")

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def js(self, expression: str) -> Any:
        """The value of an expression on the page; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = PATIENCE) -> None:
        """Until a condition holds on the page."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if self.js(f"Boolean({condition})"):
                    return
            except RuntimeError:
                pass  # the page is just being replaced
            time.sleep(0.03)
        raise AssertionError(f"never became true: {condition}; {self.errors()}")

    def errors(self) -> list[str]:
        """Exceptions, errors and warnings since the page was opened."""
        self.js("0")
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in (
                "error",
                "warning",
            ):
                found.append(parameters["entry"]["text"])
            elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append(str(parameters["args"]))
        return found

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened, data: and blob: aside."""
        self.js("0")
        asked = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith(("data:", "blob:"))]

    # What a reader does

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element in the window."""
        box = self.js(
            f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()"
        )
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def point(self, selector: str) -> None:
        """Bring the pointer over an element."""
        x, y = self.place(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, *, shift: bool = False) -> None:
        """Press and let go over the middle of an element, brought into view."""
        self.js(
            f"document.querySelector({json.dumps(selector)})"
            ".scrollIntoView({block: 'nearest', inline: 'nearest'})"
        )
        x, y = self.place(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                modifiers=8 if shift else 0,
                **pressed,
            )

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, such as Enter or p."""
        code = {
            "Enter": 13,
            "Escape": 27,
            "Tab": 9,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
        }.get(key, ord(key[0].upper()))
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key=key,
            text=text,
            windowsVirtualKeyCode=code,
            modifiers=8 if shift else 0,
        )
        self.call(
            "Input.dispatchKeyEvent",
            type="keyUp",
            key=key,
            windowsVirtualKeyCode=code,
            modifiers=8 if shift else 0,
        )

    def write(self, text: str) -> None:
        """Type text where the focus is."""
        self.call("Input.insertText", text=text)

    def slide(self, selector: str, value: float) -> None:
        """Move a slider."""
        slider = f"document.querySelector({json.dumps(selector)})"
        self.js(
            f"{slider}.value = {value}; {slider}.dispatchEvent(new Event('input', "
            f"{{bubbles: true}}))"
        )

    def screenshot(self, path: Path) -> Path:
        """A picture of the window."""
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        )
        return path

    def downloads_into(self, folder: Path) -> None:
        """Where saved files go."""
        self.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def close(self) -> None:
        """End Chromium."""
        try:
            self.session = None
            self.call("Browser.close")
            self._process.wait(15)
        except (RuntimeError, TimeoutError, BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(15)
        finally:
            os.close(self._commands)
            os.close(self._answers)


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of something outside of the browser."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.03)
    raise AssertionError("waited in vain")
