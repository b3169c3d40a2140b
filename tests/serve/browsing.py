"""What the tests of the page share: the browser, asking on the page, screenshots."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
]  # fmt: skip
SHOTS = os.environ.get("VLM_SCREENSHOTS")
"""A folder to leave screenshots in; those of `docs/` are renewed by

    VLM_SCREENSHOTS=docs VLM_TEST_ADAPTER=vlm/assets/default pytest tests/serve/test_page.py -k minute
"""


def ask(page: Any, question: str, *paths: Path) -> Any:
    """Choose pictures, ask, wait for the end; returns the answer's element."""
    if paths:
        page.set_input_files("#files", list(paths))
        expect(page.locator("#pictures li")).to_have_count(len(paths))
    before = page.locator(".answer").count()
    page.fill("#question", question)
    page.click("#send")
    answer = page.locator(".answer").nth(before)
    expect(answer.locator(".tools")).to_be_visible()
    return answer


def canned(text: str) -> str:
    """A stream that says this, for tests that are not about what the model says."""
    return f'data: {{"choices":[{{"delta":{{"content":"{text}"}}}}]}}\n\ndata: [DONE]\n\n'


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / name))
