"""Conversations that remember: in Python, and from the keyboard."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm.cli import main
from vlm.conversation import Conversation
from vlm.errors import DataError
from vlm.images import ImageError

if TYPE_CHECKING:
    from vlm.model import VLM

Draw = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


# --- in Python -------------------------------------------------------------------------------------------


def test_every_answer_sees_the_turns_before_it(tiny_model: VLM, draw: Draw) -> None:
    chat = tiny_model.chat([draw(1)])
    first = chat.ask("what?", max_new_tokens=5)
    second = chat.ask("and where?", max_new_tokens=5)
    chat.show(draw(2))
    third = chat.ask("and here?", max_new_tokens=5)
    asked = Conversation.ask([draw(1)], "what?")
    assert tiny_model.ask_batch([asked], max_new_tokens=5)[0].text == first.text
    asked = asked.answered(first.text).then("and where?")
    assert tiny_model.ask_batch([asked], max_new_tokens=5)[0].text == second.text
    asked = asked.answered(second.text).then("and here?", [draw(2)])
    assert tiny_model.ask_batch([asked], max_new_tokens=5)[0].text == third.text
    assert third.usage.images == 2
    assert third.usage.prompt_tokens > second.usage.prompt_tokens > first.usage.prompt_tokens
    assert chat.conversation is not None
    assert [turn.role for turn in chat.conversation.turns] == ["user", "assistant"] * 3


def test_streaming_is_asking(tiny_model: VLM, draw: Draw) -> None:
    asked, streamed = tiny_model.chat([draw(1)]), tiny_model.chat([draw(1)])
    for question in ("what?", "and where?"):
        whole = asked.ask(question, max_new_tokens=12).text
        assert "".join(streamed.stream(question, max_new_tokens=12)) == whole
    assert asked.conversation is not None and streamed.conversation is not None
    assert asked.conversation.turns == streamed.conversation.turns


def test_a_stream_given_up_is_not_remembered(tiny_model: VLM, draw: Draw) -> None:
    chat = tiny_model.chat([draw(1)])
    pieces = chat.stream("what?", max_new_tokens=20)
    next(pieces)
    pieces.close()
    assert chat.conversation is None
    answer = chat.ask("what?", max_new_tokens=5)  # its picture is still there
    assert answer.usage.images == 1


def test_an_error_loses_nothing(tiny_model: VLM, draw: Draw, tmp_path: Path) -> None:
    chat = tiny_model.chat([draw(1)])
    with pytest.raises(ImageError):
        chat.show(draw(2), tmp_path / "missing.png")
    with pytest.raises(DataError, match="language model reads"):
        chat.ask("8" * 5000)
    assert chat.ask("what?", max_new_tokens=3).usage.images == 1
    with pytest.raises(ImageError):
        tiny_model.chat([tmp_path / "missing.png"])


def test_more_pictures_than_fit_side_by_side(make_tiny: Callable[..., VLM], draw: Draw) -> None:
    chat = make_tiny("flamingo").chat([draw(i) for i in range(4)])
    with pytest.raises(DataError, match="at most 4 images"):
        chat.show(draw(5))
    assert chat.ask("what?", max_new_tokens=2).usage.images == 4
    chat.show(draw(5))  # after a question there is room again
    assert chat.ask("and now?", max_new_tokens=2).usage.images == 5


def test_talk_without_a_picture(tiny_model: VLM) -> None:
    chat = tiny_model.chat()
    assert chat.ask("hello", max_new_tokens=3).usage.images == 0
    assert chat.ask("and then?", max_new_tokens=3).usage.images == 0


def test_a_chat_that_outgrows_the_context(make_tiny: Callable[..., VLM]) -> None:
    chat = make_tiny("flamingo").chat()
    with pytest.raises(DataError, match="language model reads 256"):
        for _ in range(20):
            chat.ask("what is on the grass?", max_new_tokens=8)


# --- from the keyboard -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(make_tiny: Callable[..., VLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm.checkpoint import save_adapter

    folder = tmp_path_factory.mktemp("chat") / "adapter"
    save_adapter(make_tiny("flamingo", gate_init=2.0), folder)
    return folder


@pytest.fixture
def talk(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))

    def say(lines: str, *argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = main(["chat", *map(str, argv), "--adapter", str(adapter), "--max-tokens", "8"])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return say


def test_a_talk(talk: Callable[..., tuple[int, str, str]], adapter: Path, draw: Draw, tmp_path: Path) -> None:
    from vlm.model import VLM

    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw(1).save(one)
    draw(2).save(two)
    chat = VLM.from_pretrained(adapter, offline=True).chat([one])
    expected = [chat.ask("what?", max_new_tokens=8).text]
    chat.show(two)
    expected.append(chat.ask("and this?", max_new_tokens=8).text)
    code, out, err = talk(f"what?\n/show {two}\n  and this? \n\nnever asked\n", one)
    assert (code, err) == (0, "")
    assert out == "".join(f"{answer}\n" for answer in expected)


def test_a_mistyped_name_does_not_end_the_talk(
    talk: Callable[..., tuple[int, str, str]], draw: Draw, tmp_path: Path
) -> None:
    draw(1).save(tmp_path / "one.png")
    code, out, err = talk(
        f"/show {tmp_path}/nowhere.png\n/show {tmp_path}/one.png\nwhat?\n{'8' * 900}\nwhat?\n"
    )
    assert code == 0
    assert err.count("error: ") == 2
    assert "nowhere.png" in err
    assert "language model reads 256" in err
    assert out.count("\n") >= 2


def test_commands_are_no_questions_and_pictures_may_stand_in_quotes(
    talk: Callable[..., tuple[int, str, str]], draw: Draw, tmp_path: Path
) -> None:
    draw(1).save(tmp_path / "my one.png")
    escaped = str(tmp_path / "my one.png").replace(" ", "\\ ")
    lines = ["/quit", "/show", "/shwo x.png", f"/show '{tmp_path}/my one.png'", f"/show {escaped}", "what?"]
    code, out, err = talk("\n".join(lines) + "\n")
    assert code == 0
    assert err.count("is none of: /show FILE") == err.count("error: ") == 3
    assert out.count("\n") >= 1


def test_five_pictures_one_too_many(
    talk: Callable[..., tuple[int, str, str]], draw: Draw, tmp_path: Path
) -> None:
    draw(1).save(tmp_path / "one.png")
    code, out, err = talk(f"/show {tmp_path}/one.png\n" * 5 + "what?\n")
    assert code == 0
    assert err.count("at most 4 images") == 1
    assert out


def test_nothing_to_say(talk: Callable[..., tuple[int, str, str]]) -> None:
    assert talk("") == (0, "", "")
    assert talk("\n") == (0, "", "")


def test_a_bad_first_picture(talk: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = talk("what?\n", tmp_path / "missing.png")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


def test_beams_cannot_be_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--beams", "3"])
    assert ended.value.code == 2
    assert "streamed" in capsys.readouterr().err


def test_bytes_that_are_no_text(adapter: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlm", "chat", "--adapter", str(adapter), "--max-tokens", "4"],
        cwd=ROOT,
        env={**os.environ, "VLM_CACHE": str(tmp_path / "cache"), "PYTHONIOENCODING": "utf-8:strict"},
        input=b"caf\xe9?\n",
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n")
    assert b"Traceback" not in done.stderr
