"""The page in Debian's Chromium: the whole journey, bad files, two people at once, accessibility."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
]  # fmt: skip
SHOTS = os.environ.get("VLM_SCREENSHOTS")
"""A folder to leave screenshots in; those of `docs/` are renewed by

    VLM_SCREENSHOTS=docs VLM_TEST_ADAPTER=vlm/assets/default pytest tests/serve/test_page.py -k minute
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page in a browser context of its own; complaints of the browser fail the test."""
    contexts = []
    complaints: list[str] = []
    foreign: list[str] = []

    def open_page(url: str = server.url, **options: Any) -> Any:
        context = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Content Security" in m.text else None)
        home = (url, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(home) else foreign.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []


@pytest.fixture
def files(tmp_path: Path, make: Any) -> Callable[[int], Path]:
    def write(seed: int) -> Path:
        path = tmp_path / f"picture-{seed}.png"
        path.write_bytes(make.png(make.picture(seed, 240)))
        return path

    return write


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


def test_the_first_minute_with_a_sample(visit: Any) -> None:
    page = visit()
    shoot(page, "page-start.png")
    page.click("text=A cup of coffee")
    expect(page.locator("#pictures img")).to_have_attribute("alt", "A cup of coffee")
    expect(page.locator("#question")).to_have_value("What is in the cup?")
    page.press("#question", "Enter")
    answer = page.locator(".answer")
    expect(answer.locator(".tools")).to_be_visible()
    expect(answer.locator(".words")).not_to_be_empty()
    expect(page.locator("#status")).to_contain_text("Answer: ")
    shoot(page, "page-answer.png")


def test_several_pictures_turns_copy_and_starting_anew(
    visit: Any, server: Any, make: Any, files: Any
) -> None:
    page = visit()
    first = ask(page, "Compare them.", files(1), files(2))
    page.set_input_files("#files", str(files(3)))
    page.click("[aria-label='Remove picture-3.png']")
    expect(page.locator("#pictures li")).to_have_count(0)
    second = ask(page, "And now?")
    texts = [element.locator(".words").text_content() for element in (first, second)]
    messages: list[object] = [
        make.user("Compare them.", *(make.data_url(files(i).read_bytes()) for i in (1, 2)))
    ]
    for text, following in zip(texts, ("And now?", None), strict=True):
        reply = server.chat(messages=messages, max_tokens=24)
        assert reply.json()["choices"][0]["message"]["content"] == text
        messages += [{"role": "assistant", "content": text}, make.user(following or "")]
    first.locator(".copy").click()
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == texts[0]
    page.click("#fresh")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#samples")).to_be_visible()


def test_stop(visit: Any, server: Any, files: Any) -> None:
    page = visit()
    page.set_input_files("#files", str(files(4)))
    expect(page.locator("#pictures li")).to_have_count(1)
    page.fill("#question", "Tell me a very long story about this.")
    page.click("#send")
    page.click("#stop")
    expect(page.locator(".answer .note")).to_have_text("Stopped.")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#stop")).to_be_hidden()
    page.wait_for_timeout(1000)
    assert server.metric("vlm_answers_running ") == 0


def test_drop_paste_and_camera(visit: Any, files: Any) -> None:
    page = visit()
    send = """([kind, bytes]) => {
        const file = new File([new Uint8Array(bytes)], kind + ".png", { type: "image/png" });
        const data = new DataTransfer();
        data.items.add(file);
        const event = kind === "drop"
            ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
        document.body.dispatchEvent(event);
    }"""
    for count, kind in enumerate(("drop", "paste"), 1):
        page.evaluate(send, [kind, list(files(count).read_bytes())])
        expect(page.locator("#pictures li")).to_have_count(count)
    page.click("#camera")
    expect(page.locator("#camera-box")).to_be_visible()
    video = page.locator("#camera-view")
    # Not wait_for_function: the page's policy forbids the `eval` that it polls with.
    while not video.evaluate("view => view.videoWidth"):
        page.wait_for_timeout(50)
    page.click("#camera-take")
    expect(page.locator("#pictures li")).to_have_count(3)
    expect(page.locator("#pictures img").last).to_have_attribute("alt", "photograph")


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


def test_feedback_with_consent_shown(visit: Any, server: Any, files: Any) -> None:
    page = visit()
    answer = ask(page, "What colour?", files(1))
    answer.locator(".down").click()
    expect(answer.locator(".consent")).to_be_visible()
    expect(answer.locator(".consent")).to_contain_text("stores the pictures")
    before = opinions(server)
    answer.locator(".cancel").click()
    assert opinions(server) == before
    answer.locator(".down").click()
    answer.locator(".opinion input").fill("mostly red")
    shoot(page, "page-feedback.png")
    answer.locator(".opinion .primary").click()
    expect(answer.locator(".thanks")).to_contain_text("Thank you")
    assert opinions(server) - before == {("down", "mostly red")}
    liked = ask(page, "And the other one?")
    liked.locator(".up").click()
    expect(liked.locator(".consent")).to_be_visible()
    expect(liked.locator(".opinion input")).to_be_hidden()
    before = opinions(server)
    liked.locator(".opinion .primary").click()
    expect(liked.locator(".thanks")).to_contain_text("Thank you")
    assert opinions(server) == before | {("up", None)}


def test_where_it_looked(visit: Any, files: Any) -> None:
    page = visit()
    answer = ask(page, "Compare them.", files(1), files(2))
    answer.locator(".look").click()
    maps = answer.locator(".looked canvas")
    expect(maps).to_have_count(2)
    expect(maps.first).to_have_attribute("aria-label", re.compile("looked mostly at the"))
    expect(answer.locator(".look")).to_have_attribute("aria-pressed", "true")
    shoot(page, "page-looked.png")
    answer.locator(".look").click()
    expect(answer.locator(".looked")).to_be_hidden()


def opinions(server: Any) -> set[tuple[str, str | None]]:
    command = server.process.args
    with sqlite3.connect(command[command.index("--feedback") + 1]) as database:
        return set(database.execute("SELECT verdict, correction FROM feedback"))


def test_two_browsers_at_once(visit: Any, files: Any) -> None:
    pages = [visit(), visit()]
    for number, page in enumerate(pages):
        page.set_input_files("#files", str(files(20 + number)))
        expect(page.locator("#pictures li")).to_have_count(1)
        page.fill("#question", f"Which of the two is it, {number}?")
    for page in pages:
        page.click("#send")
    for number, page in enumerate(pages):
        expect(page.locator(".answer .tools")).to_be_visible()
        expect(page.locator(".question .words")).to_have_text(f"Which of the two is it, {number}?")
        assert page.locator(".turn").count() == 2


def test_a_key_is_asked_for(visit: Any, start: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    from vlm.serve.keys import add_key

    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    key = add_key(path, "page")
    locked = start("--api-key-file", str(path), key=key)
    page = visit(locked.url)
    expect(page.locator("#key-form")).to_be_visible()
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    expect(page.locator("#key-note")).to_have_text("That key does not open this server.")
    # A key that no header can hold must not stop every later request.
    page.fill("#key", "ключ")
    page.press("#key", "Enter")
    expect(page.locator("#key-note")).to_have_text("That key does not open this server.")
    expect(page.locator("#key")).to_be_focused()
    assert page.evaluate("sessionStorage.getItem('vlm-key')") == "wrong"
    # A wrong key whose refusal comes only after the right one was let in.
    late: list[Any] = []
    page.route("**/v1/page", lambda route: route.continue_() if late else late.append(route))
    for typed in ("wrong again", key):
        page.fill("#key", typed)
        page.press("#key", "Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    with page.expect_response(lambda response: response.status == 401):
        late[0].continue_()
    page.wait_for_timeout(300)
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("model")
    locked.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_accessibility_and_width(visit: Any, files: Any, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(viewport={"width": width, "height": 760}, color_scheme=scheme, bypass_csp=True)
    answer = canned("four squares of many colours side by side")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=answer))
    for stage in ("start", "answered", "opinion"):
        if stage == "answered":
            ask(page, "What is it?", files(1))
        if stage == "opinion":
            page.locator(".down").click()
        page.wait_for_timeout(300)  # the turn's fade ends; axe reads colours
        results = axe.run(page)
        assert results.violations_count == 0, f"{stage}: {results.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        shoot(page, f"page-{stage}-{scheme}-{width}.png")


def test_the_keyboard_reaches_everything(visit: Any) -> None:
    page = visit()
    expect(page.locator(".samples button")).to_have_count(4)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        )
    assert reached[0] == "Skip to the question"
    assert {"A cat", "question", "choose", "camera", "send"} <= set(reached)
    assert "files" not in reached


def test_the_keyboard_keeps_its_place_while_an_answer_comes(visit: Any, files: Any) -> None:
    page = visit()
    waiting: list[Any] = []
    page.route("**/v1/chat/completions", lambda route: waiting.append(route))
    page.set_input_files("#files", str(files(1)))
    expect(page.locator("#pictures li")).to_have_count(1)
    page.fill("#question", "What is it?")
    page.locator("#send").press("Enter")
    expect(page.locator("#stop")).to_be_focused()
    waiting[0].fulfill(status=200, body=canned("a cat"))
    expect(page.locator("#question")).to_be_focused()
    page.fill("#question", "And now?")
    page.press("#question", "Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#question")).to_be_focused()
    page.click("#stop")
    expect(page.locator("#question")).to_be_focused()


def test_the_policy_is_strict(server: Any) -> None:
    policy = httpx.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    sources = set(re.findall(r"script-src ([^;]*)", policy))
    assert sources == {"'self'"}
