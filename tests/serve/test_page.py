"""The page in Debian's Chromium: the whole journey, two people at once, keys, accessibility."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

import httpx
import pytest
from browsing import ask, canned, expect, needs_browser, shoot

pytestmark = needs_browser


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
