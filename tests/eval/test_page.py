"""The report's page, in a real browser where there is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.eval.page import render, write_page
from vlm.eval.report import siblings

REPORT: dict[str, Any] = {
    "task": "folder-vqa",
    "split": "test",
    "n": 14,
    "comparable": False,
    "main_metric": "exact_match",
    "metrics": {"exact_match": 57.1},
    "intervals": {"exact_match": [30.0, 80.0]},
    "breakdown": {"question_type=count": {"n": 14, "exact_match": 57.1}},
    "skipped": {"meteor": "no Java here"},
    "rates": {"empty": 7.1, "cut": 0.0},
    "controls": {
        "blank": {"metrics": {"exact_match": 21.4}},
        "prior": {"metrics": None, "reason": "the task has no training split"},
    },
    "text_only": {"metric": "exact_match", "value": 21.4, "control": "blank"},
    "calibration": {"curve": [[20.0, 10.0], [90.0, 80.0]], "risk": [[50.0, 80.0], [100.0, 57.1]]},
    "published": [{"metric": "exact_match", "value": 60.0, "source": "somebody <2020>"}],
    "hashes": {"data": "ab" * 32, "scorer": "cd" * 32},
    "decoding": {"max_new_tokens": 8},
    "prompt": "user: What is it?",
    "adapter": "default",
}


def items(folder: Path) -> list[dict[str, Any]]:
    Image.linear_gradient("L").convert("RGB").save(folder / "p.png")
    return [
        {
            "id": f"i{number}",
            "images": [str(folder / "p.png")] if number else ["/no/such/file.png"],
            "question": "<script>alert(1)</script>" if number == 3 else f"question {number}?",
            "references": ["a", "b"],
            "answer": "" if number == 5 else f"answer {number}",
            "scores": {"exact_match": 100.0 * (number % 2)},
            **({"maps": [[[0.0, 0.2], [1.0, 0.0]]]} if number in (7, 8) else {}),
        }
        for number in range(14)
    ]


def test_everything_is_inside_and_escaped(tmp_path: Path) -> None:
    page = render(REPORT, items(tmp_path))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/jpeg;base64,") == 13
    assert "somebody &lt;2020&gt;" in page
    assert "not comparable" in page
    assert "the task has no training split" in page
    assert "Seen in training" not in page


def test_what_was_seen_in_training_stands_on_the_page(tmp_path: Path) -> None:
    seen = {
        "training_pictures": 9,
        "pictures": 2,
        "examples": 14,
        "pairs": [["a<b.png", "t.png"]],
        "without": None,
        "questions_seen": None,
    }
    page = render(REPORT | {"contamination": seen}, items(tmp_path))
    assert "<h2>Seen in training</h2>" in page
    assert "2 pictures of 14 examples are among 9 training pictures" in page
    assert "no other example is left to score" in page
    assert "a&lt;b.png" in page


def test_in_a_browser(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    browser_path = (
        shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    )
    if browser_path is None:
        pytest.skip("no Chromium on this machine")
    report = tmp_path / "r.json"
    report.write_text(json.dumps(REPORT), encoding="utf-8")
    lines = "\n".join(map(json.dumps, items(tmp_path)))
    siblings(report, "items").write_text(lines, encoding="utf-8")
    page_path = write_page(report)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        asked: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(page_path.as_uri())
        assert page.title() == "folder-vqa, test"
        assert page.locator("ul.items li").count() == 14
        loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
        assert page.locator("ul.items img").evaluate_all(loaded)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        maps = page.locator("ul.items img.map")
        assert maps.count() == 2
        for number in range(2):  # each lies exactly over its picture
            over = maps.nth(number).bounding_box()
            below = maps.nth(number).locator("xpath=preceding-sibling::img").bounding_box()
            assert over is not None and below is not None
            assert over == pytest.approx(below, abs=1.0)
        strongest = (
            "map => { const canvas = document.createElement('canvas'); canvas.width = canvas.height = 2;"
            "const pen = canvas.getContext('2d'); pen.drawImage(map, 0, 0);"
            "const seen = pen.getImageData(0, 0, 2, 2).data; return [3, 7, 11, 15].map(at => seen[at]); }"
        )
        clear, faint, strong, none = maps.first.evaluate(strongest)
        assert (clear, none) == (0, 0) and 0 < faint < strong
        page.get_by_label("Show what the answers lean on").uncheck()
        assert not maps.first.is_visible()
        browser.close()
    assert not problems
    assert all(url.startswith(("file:", "data:")) for url in asked)
