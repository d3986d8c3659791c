"""A real headless Chromium for pages that kvcli writes: Debian's package, steered by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Skips with the reason where there is no browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as steering:
        browser = steering.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page from disk. requests: everything it asked for but itself; problems: console errors and exceptions."""

    page: Any
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """opened(path, **context): a fresh page in the browser. At the end it must have had no problem and asked for
    nothing."""
    every: list[Opened] = []
    contexts = []

    def open_page(path: Path, **context: Any) -> Opened:
        contexts.append(chromium.new_context(viewport={"width": 1280, "height": 900}, **context))
        found = Opened(contexts[-1].new_page())
        own = path.resolve().as_uri()
        found.page.on("request", lambda r: found.requests.append(r.url) if r.url.partition("#")[0] != own else None)
        found.page.on("console", lambda m: found.problems.append(m.text) if m.type in ("error", "warning") else None)
        found.page.on("pageerror", lambda e: found.problems.append(str(e)))
        found.page.goto(own)
        every.append(found)
        return found

    yield open_page
    for context in contexts:
        context.close()
    for found in every:
        assert found.problems == []
        assert [url for url in found.requests if not url.startswith("data:")] == []
