"""Debian's Chromium, driven by Playwright, for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
}
NARROW: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True}
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
DARK: dict[str, Any] = {**DESKTOP, "color_scheme": "dark"}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the system's Chromium; skip where there is none, but never in CI."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        said = "Chromium is not installed (`make browser` installs it)"
        assert "CI" not in os.environ, said
        pytest.skip(said)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, device: dict[str, Any]) -> Iterator[Page]:
    """Show a page; fail when it says anything on the console, or asks for another file."""
    context = browser.new_context(**device)
    try:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(_text(message)))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        answer = page.goto(url)
        assert answer is not None and answer.ok
        yield page
        assert not said, said
        assert [one for one in asked if not one.startswith("data:")] == [url]
    finally:
        context.close()


def _text(message: ConsoleMessage) -> str:
    return f"{message.type}: {message.text}"
