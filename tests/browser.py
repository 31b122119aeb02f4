"""A real browser for tests: a headless Chromium from the system, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import ConsoleMessage, Download, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--disable-quic", "--disable-background-networking", "--disable-dev-shm-usage"]
REQUIRE = "CIRCUITS_REQUIRE_BROWSER"
PATIENCE = 60.0  # seconds
READY = "document.body?.dataset.ready === 'true' && document.readyState === 'complete'"


def find_chromium() -> str:
    """The path of a Chromium; without one the test is skipped, or fails where
    CIRCUITS_REQUIRE_BROWSER=1 says that it must run.
    """
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        message = "no Chromium found; get one, for example with apt-get install chromium"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{message} ({REQUIRE}=1 is set)")
        pytest.skip(message)
    return found


class Browser:
    """A running Chromium with one page, and what that page did: messages, errors, requests."""

    def __init__(self) -> None:
        executable = find_chromium()
        self._playwright = sync_playwright().start()
        self._chromium = self._playwright.chromium.launch(
            executable_path=executable, chromium_sandbox=False, args=FLAGS
        )
        self.page = self._chromium.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(PATIENCE * 1000)
        self._errors: list[str] = []
        self._requests: list[str] = []
        self._downloads: Path | None = None
        self.page.on("pageerror", lambda error: self._errors.append(str(error)))
        self.page.on("console", self._note_message)
        self.page.on("request", self._note_request)
        self.page.on("download", self._save_download)

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self._errors.append(message.text)

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self._requests.append(request.url)

    def _save_download(self, download: Download) -> None:
        if self._downloads is not None:
            download.save_as(self._downloads / download.suggested_filename)

    # Pages

    def open(self, address: str | Path) -> None:
        """Load an address or file, and wait until the page says that it is ready."""
        self._errors.clear()
        self._requests.clear()
        self.page.goto(address.as_uri() if isinstance(address, Path) else address)
        self.wait(READY)

    def another_page(self) -> Page:
        """A page of its own, that the caller closes."""
        return self._chromium.new_page()

    def reload(self) -> None:
        """Load the page anew."""
        self.page.reload()
        self.wait(READY)

    def resize(self, width: int, height: int) -> None:
        """Give the window another size."""
        self.page.set_viewport_size({"width": width, "height": height})

    def js(self, expression: str) -> Any:
        """The value of an expression on the page; promises are awaited."""
        return self.page.evaluate(f"() => ({expression})")

    def wait(self, condition: str, seconds: float = PATIENCE) -> None:
        """Until a condition holds on the page."""
        self.page.wait_for_function(f"() => Boolean({condition})", timeout=seconds * 1000)

    def errors(self) -> list[str]:
        """Exceptions, errors and warnings since the page was opened."""
        self.js("0")
        return list(self._errors)

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened, data: and blob: aside."""
        self.js("0")
        return list(self._requests)

    # What a reader does

    def point(self, selector: str) -> None:
        """Bring the pointer over an element."""
        x, y = self._middle(selector)
        self.page.mouse.move(x, y)

    def click(self, selector: str, *, shift: bool = False) -> None:
        """Press and let go over the middle of an element, brought into view."""
        self.page.locator(selector).first.evaluate(
            "(element) => element.scrollIntoView({block: 'nearest', inline: 'nearest'})"
        )
        x, y = self._middle(selector)
        if shift:
            self.page.keyboard.down("Shift")
        self.page.mouse.click(x, y)
        if shift:
            self.page.keyboard.up("Shift")

    def _middle(self, selector: str) -> tuple[float, float]:
        """The middle of an element in the window."""
        box = self.page.locator(selector).first.evaluate(
            "(element) => element.getBoundingClientRect().toJSON()"
        )
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, such as Enter or p."""
        self.page.keyboard.press(f"Shift+{key}" if shift else key)

    def write(self, text: str) -> None:
        """Type text where the focus is."""
        self.page.keyboard.insert_text(text)

    def slide(self, selector: str, value: float) -> None:
        """Move a slider."""
        self.page.locator(selector).first.evaluate(
            "(slider, value) => { slider.value = value; "
            "slider.dispatchEvent(new Event('input', {bubbles: true})); }",
            value,
        )

    def screenshot(self, path: Path) -> Path:
        """A picture of the window."""
        self.page.screenshot(path=path)
        return path

    def downloads_into(self, folder: Path) -> None:
        """Where saved files go."""
        self._downloads = folder

    def close(self) -> None:
        """End Chromium."""
        self._chromium.close()
        self._playwright.stop()


def wait_for(browser: Browser, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of something outside of the browser, whose events go on meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        browser.page.wait_for_timeout(30)
    raise AssertionError("waited in vain")
