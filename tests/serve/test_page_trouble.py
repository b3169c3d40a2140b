"""The page when something is wrong: bad files, too much of something, servers that refuse or break off."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import ask, canned, expect, needs_browser
from PIL import Image

pytestmark = needs_browser


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BAD = {
    "empty.png": b"",
    "words.png": b"this is no picture",
    "page.html": b"<script>alert(1)</script>",
    "cut.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01",
    "paper.pdf": b"%PDF-1.7 something",
    "photo.heic": b"\0\0\0\x1cftypheic" + b"\0" * 40,
    "scan.tiff": b"II*\0" + b"\0" * 40,
    "archive.zip": b"PK\x03\x04",
    "bomb.png": b"\x89PNG\r\n\x1a\n"
    + png_chunk(b"IHDR", b"\0\0\xea\x60\0\0\xea\x60\x08\x02\0\0\0")
    + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    + png_chunk(b"IEND", b""),
    "huge.jpg": b"\xff\xd8\xff\xe0" + bytes(25 << 20),
    "script.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_files_are_refused_and_the_page_goes_on(
    visit: Any, tmp_path: Path, files: Any, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name])
    page = visit()
    page.set_input_files("#files", str(path))
    expect(page.locator("#trouble")).to_contain_text(f"{name} is not a picture")
    expect(page.locator("#pictures li")).to_have_count(0)
    page.set_input_files("#files", str(files(1)))
    expect(page.locator("#pictures li")).to_have_count(1)
    expect(page.locator("#trouble")).to_be_empty()


def test_pictures_that_are_large_together_are_sent_smaller(visit: Any, tmp_path: Path) -> None:
    """Eight PNGs of 3.8 MiB and one of 26 MiB: as they are, neither eight nor the one would be let in."""
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), dtype=np.uint8)
    paths = []
    for number, side in enumerate([1150] * 7 + [3000]):
        paths.append(tmp_path / f"noise-{number}.png")
        Image.fromarray(noise[:side, :side]).save(paths[-1], compress_level=0)
    assert sum(path.stat().st_size for path in paths) > 50 << 20
    page = visit()
    page.set_input_files("#files", [str(path) for path in paths])
    expect(page.locator("#pictures li")).to_have_count(8)
    page.fill("#question", "What is it?")
    with page.expect_response("**/v1/chat/completions") as replied:
        page.click("#send")
    assert replied.value.status == 200
    assert len(replied.value.request.post_data_buffer) < 32 << 20


def test_words_beyond_the_servers_bound_are_not_sent(visit: Any, files: Any) -> None:
    page = visit()
    page.set_input_files("#files", str(files(1)))
    expect(page.locator("#pictures li")).to_have_count(1)
    page.fill("#question", "word " * 7000)
    page.click("#send")
    expect(page.locator("#trouble")).to_contain_text("32000 characters")
    assert page.locator(".turn").count() == 0


def test_what_only_the_server_refuses_is_shown_and_does_not_spoil_the_next(
    visit: Any, make: Any, files: Any
) -> None:
    page = visit()
    # A browser reads a PNG whose last bytes are missing; the server's door does not.
    cut = make.png(make.picture(9, 240))[:-20]
    page.set_input_files("#files", {"name": "cut.png", "mimeType": "image/png", "buffer": cut})
    page.locator("#pictures li, #trouble:not(:empty)").first.wait_for()
    if page.locator("#pictures li").count():
        page.fill("#question", "What is it?")
        page.click("#send")
        expect(page.locator(".answer .note")).to_contain_text("picture 1")
    answer = ask(page, "What is it?", files(2))
    expect(answer.locator(".note")).to_be_hidden()


def test_an_error_can_be_tried_again(visit: Any, files: Any) -> None:
    page = visit()
    error = (
        '{"error": {"message": "Come back later.", "type": "x", "param": null, "code": "server_overloaded"}}'
    )
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, body=error), times=1)
    answer = ask(page, "What is it?", files(1))
    expect(answer.locator(".note")).to_have_text("Come back later.")
    answer.locator(".again").click()
    expect(answer.locator(".words")).not_to_be_empty()
    expect(answer.locator(".again")).to_be_hidden()


def test_a_stream_that_breaks_says_so(visit: Any, files: Any) -> None:
    page = visit()
    frames = 'data: {"choices":[{"delta":{"content":"Hal"}}]}\n\n'
    frames += 'data: {"error":{"message":"Too late.","code":"x"}}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=frames), times=1)
    answer = ask(page, "What is it?", files(1))
    expect(answer.locator(".words")).to_have_text("Hal")
    expect(answer.locator(".note")).to_have_text("Too late.")


def test_an_answer_of_no_words_does_not_end_the_conversation(visit: Any, files: Any) -> None:
    page = visit()
    nothing = 'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=nothing), times=1)
    page.set_input_files("#files", str(files(1)))
    expect(page.locator("#pictures li")).to_have_count(1)
    page.fill("#question", "What is it?")
    page.click("#send")
    expect(page.locator(".answer .note")).to_have_text("No answer.")
    expect(page.locator("#status")).to_have_text("No answer.")
    with page.expect_response("**/v1/chat/completions") as replied:
        page.fill("#question", "And what colour?")
        page.click("#send")
    assert replied.value.status == 200
    sent = replied.value.request.post_data_json["messages"]
    assert [message["role"] for message in sent] == ["user", "user"]


def test_model_output_stays_text(visit: Any, files: Any) -> None:
    page = visit()
    text = "<img src=x onerror=window.hacked=1> ![x](https://evil.example/y.png) "
    text += "<script>window.hacked=1</script>"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=canned(text)))
    answer = ask(page, text, files(1))
    expect(answer.locator(".words")).to_have_text(text)
    assert answer.locator(".words img, .words script").count() == 0
    assert page.locator(".question .words img").count() == 0
    assert page.evaluate("window.hacked") is None
