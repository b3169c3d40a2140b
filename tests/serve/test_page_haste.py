"""The page with people in haste: pressed twice, asked while pictures are read, started before the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browsing import ask, canned, expect, needs_browser
from PIL import Image

pytestmark = needs_browser
CHAT = "**/v1/chat/completions"
SLOW = """() => {
    const read = window.createImageBitmap;
    window.createImageBitmap = async (...given) => {
        await new Promise((go) => (window.go = go));
        return read(...given);
    };
}"""


def fill(page: Any, question: str, path: Path) -> None:
    page.set_input_files("#files", str(path))
    expect(page.locator("#pictures li")).to_have_count(1)
    page.fill("#question", question)


def pictures_of(request: Any) -> int:
    (message,) = request.post_data_json["messages"]
    return sum(part["type"] == "image_url" for part in message["content"])


def reply(page: Any, body: str, status: int = 200) -> None:
    """What the next question gets."""
    page.route(CHAT, lambda route: route.fulfill(status=status, body=body), times=1)


def refuse(page: Any, status: int, code: str) -> None:
    error = {"message": "Not this.", "type": "x", "param": None, "code": code}
    reply(page, json.dumps({"error": error}), status)


def test_an_opinion_sent_twice_is_stored_once(visit: Any, files: Any) -> None:
    page = visit()
    reply(page, canned("a cat"))
    sent: list[Any] = []
    page.route("**/v1/feedback", lambda route: sent.append(route))
    answer = ask(page, "What is it?", files(1))
    answer.locator(".up").click()
    answer.locator(".opinion .primary").dblclick()
    answer.locator(".cancel").click()  # too late to take it back
    answer.locator(".down").click()
    expect(answer.locator(".opinion")).to_be_visible()
    expect(answer.locator(".up")).to_have_attribute("aria-pressed", "true")
    answer.locator(".opinion .primary").click()
    page.wait_for_timeout(200)
    assert len(sent) == 1
    sent[0].fulfill(status=200, body='{"id": 1}')
    expect(answer.locator(".thanks")).to_contain_text("Thank you")


def test_an_opinion_that_failed_can_be_sent_again(visit: Any, files: Any) -> None:
    page = visit()
    reply(page, canned("a cat"))
    answer = ask(page, "What is it?", files(1))
    page.route("**/v1/feedback", lambda route: route.abort(), times=1)
    answer.locator(".up").click()
    answer.locator(".opinion .primary").click()
    expect(answer.locator(".thanks")).to_contain_text("cannot be reached")
    answer.locator(".opinion .primary").click()
    expect(answer.locator(".thanks")).to_contain_text("Thank you")


def test_a_question_waits_for_its_pictures(visit: Any, files: Any) -> None:
    page = visit()
    reply(page, canned("a cat"))
    fill(page, "What is it?", files(1))
    page.evaluate(SLOW)
    page.set_input_files("#files", str(files(2)))
    page.press("#question", "Enter")
    expect(page.locator("#trouble")).to_contain_text("still being read")
    assert page.locator(".turn").count() == 0
    page.evaluate("window.go()")
    expect(page.locator("#pictures li")).to_have_count(2)
    expect(page.locator("#trouble")).to_be_empty()
    with page.expect_request(CHAT) as asked:
        page.press("#question", "Enter")
    assert pictures_of(asked.value) == 2


def test_pictures_of_before_starting_anew_do_not_come_after_it(visit: Any, files: Any) -> None:
    page = visit()
    reply(page, canned("a cat"))
    ask(page, "What is it?", files(1))
    page.evaluate(SLOW)
    page.set_input_files("#files", str(files(2)))
    page.click("#fresh")
    page.evaluate("window.go()")
    page.wait_for_timeout(200)
    expect(page.locator("#pictures li")).to_have_count(0)
    page.set_input_files("#files", str(files(3)))
    page.wait_for_timeout(100)
    page.evaluate("window.go()")
    expect(page.locator("#pictures img")).to_have_attribute("alt", "picture-3.png")


def test_a_page_that_was_open_before_the_server(visit: Any, server: Any, files: Any) -> None:
    page = visit()
    page.route("**/v1/page", lambda route: route.abort(), times=2)
    page.reload()
    expect(page.locator("#trouble")).to_contain_text("cannot be reached")
    answer = ask(page, "What is it?", files(1))
    expect(answer.locator(".note")).to_contain_text("cannot be reached")
    answer.locator(".again").click()
    expect(answer.locator(".words")).not_to_be_empty()
    expect(page.locator("#model")).to_have_text("model")


def test_an_answer_cut_by_its_length_says_so(visit: Any, files: Any) -> None:
    page = visit()
    for reason, shown in (("length", True), ("stop", False)):
        frames = canned("Once upon").replace('"Once upon"}', f'"Once upon"}},"finish_reason":"{reason}"')
        reply(page, frames)
        answer = ask(page, "Tell a story.", files(1))
        expect(answer.locator(".words")).to_have_text("Once upon")
        expect(answer.locator(".cut")).to_be_visible(visible=shown)
        said = page.locator("#status").text_content()
        assert said.startswith("Answer: Once upon") and ("it ends here" in said) == shown


def test_trying_again_is_offered_only_while_it_can_be_done(visit: Any, files: Any) -> None:
    page = visit()
    refuse(page, 429, "server_overloaded")
    failed = ask(page, "What is it?", files(1))
    expect(failed.locator(".again")).to_be_visible()
    ask(page, "And this?", files(2))
    expect(failed.locator(".again")).to_be_hidden()
    expect(failed.locator(".change")).to_be_hidden()


def test_a_refused_question_can_be_changed_and_asked_again(visit: Any, files: Any) -> None:
    page = visit()
    refuse(page, 400, "invalid_image")
    failed = ask(page, "What are they?", files(1), files(2))
    expect(failed.locator(".note")).to_have_text("Not this.")
    expect(failed.locator(".again")).to_be_hidden()
    failed.locator(".change").click()
    expect(page.locator("#question")).to_have_value("What are they?")
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator("#pictures li")).to_have_count(2)
    expect(failed.locator(".change")).to_be_hidden()
    page.click("[aria-label='Remove picture-1.png']")
    reply(page, canned("a cat"))
    with page.expect_request(CHAT) as asked:
        page.click("#send")
    assert pictures_of(asked.value) == 1


def test_samples_pressed_twice_or_after_typing(visit: Any) -> None:
    page = visit()
    page.locator("text=A rocket").dblclick()
    expect(page.locator("#question")).to_have_value("Describe the picture.")
    page.click("text=A rocket")
    page.click("text=A cat")
    expect(page.locator("#question")).to_have_value("What animal is this?")
    expect(page.locator("#pictures li")).to_have_count(2)
    page.fill("#question", "My own question")
    page.click("text=An astronaut")
    expect(page.locator("#pictures li")).to_have_count(3)
    expect(page.locator("#question")).to_have_value("My own question")


@pytest.mark.parametrize("lost", [True, False])
def test_a_sample_that_does_not_come(visit: Any, lost: bool) -> None:
    page = visit()
    page.wait_for_load_state("networkidle")
    spoil = (lambda route: route.abort()) if lost else (lambda route: route.fulfill(status=503, body="{}"))
    page.route("**/page/samples/cat.jpg", spoil)
    page.click("text=A cat")
    expect(page.locator("#trouble")).to_contain_text("That sample cannot be loaded now")
    expect(page.locator("#question")).to_have_value("")
    page.unroute("**/page/samples/cat.jpg")
    page.click("text=A cat")
    expect(page.locator("#pictures li")).to_have_count(1)


@pytest.mark.parametrize(("kind", "size"), [("jpg", (8000, 6300)), ("webp", (4400, 4000))])
def test_a_picture_of_few_bytes_and_many_pixels_is_sent_smaller(
    visit: Any, tmp_path: Path, kind: str, size: tuple[int, int]
) -> None:
    """As they are, the server would refuse them: 50.4 and 17.6 million pixels."""
    path = tmp_path / f"plain.{kind}"
    Image.new("RGB", size, (90, 120, 200)).save(path)
    assert path.stat().st_size < 1 << 20
    page = visit()
    fill(page, "What is it?", path)
    with page.expect_response(CHAT) as replied:
        page.click("#send")
    assert replied.value.status == 200
