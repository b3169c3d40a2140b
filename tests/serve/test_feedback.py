"""Opinions go in with consent and come out as preference pairs."""

from __future__ import annotations

import io
import json
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from vlm.conversation import Conversation, ImageSlot, Turn
from vlm.errors import DataError
from vlm.serve.feedback import FeedbackFull, FeedbackStore

if TYPE_CHECKING:
    import httpx

    from vlm.model import VLM

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


def ask(question: str = "What is it?") -> Conversation:
    return Conversation.ask([RED], question)


def test_a_correction_makes_a_pair_with_its_picture(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.db")
    store.add(ask(), [RED], "a dog", "down", "a “cat”")
    result = store.export(tmp_path / "out")
    assert (result.pairs, result.unused, result.pictures) == (1, 0, 1)
    (line,) = (tmp_path / "out" / "pairs.jsonl").read_text("utf-8").splitlines()
    pair = json.loads(line)
    assert pair["chosen"] == "a “cat”" and pair["rejected"] == "a dog" and pair["id"] == "feedback-1"
    assert pair["turns"] == [{"role": "user", "parts": [{"image": 0}, {"text": "What is it?"}]}]
    with Image.open(tmp_path / "out" / pair["images"][0]) as picture:
        assert picture.size == (8, 8) and picture.getpixel((4, 4))[0] > 240


def test_thumbs_pair_only_within_one_conversation(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.db")
    store.add(ask(), [RED], "red", "up")
    store.add(ask(), [RED], "green", "down")
    store.add(ask(), [BLUE], "green", "down")
    store.add(ask("Why?"), [RED], "because", "down")
    store.add(ask("Who?"), [RED], "same", "up")
    store.add(ask("Who?"), [RED], "same", "down")
    result = store.export(tmp_path / "out")
    assert (result.pairs, result.unused) == (1, 4)
    pair = json.loads((tmp_path / "out" / "pairs.jsonl").read_text())
    assert (pair["chosen"], pair["rejected"], pair["id"]) == ("red", "green", "feedback-1-2")


def test_the_same_pair_twice_is_written_once(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "f.db")
    for _ in range(3):
        store.add(ask(), [RED], "a dog", "down", "a cat")
    assert store.export(tmp_path / "out").pairs == 1
    assert store.export(tmp_path / "out").pairs == 1


def test_several_turns_and_pictures_keep_their_order(tmp_path: Path) -> None:
    conversation = Conversation(
        (RED, BLUE),
        (
            Turn("user", ("first ", ImageSlot(0), "then ", ImageSlot(1))),
            Turn("assistant", ("two colours",)),
            Turn("user", ("which?",)),
        ),
    )
    store = FeedbackStore(tmp_path / "f.db")
    store.add(conversation, [RED, BLUE], "x", "down", "red and blue")
    store.export(tmp_path / "out")
    pair = json.loads((tmp_path / "out" / "pairs.jsonl").read_text())
    assert [list(part) for part in pair["turns"][0]["parts"]] == [["text"], ["image"], ["text"], ["image"]]
    assert [turn["role"] for turn in pair["turns"]] == ["user", "assistant", "user"]
    assert len(set(pair["images"])) == 2


def test_metadata_of_photographs_is_not_kept(tmp_path: Path) -> None:
    source = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    RED.save(source, "JPEG", exif=exif, comment=b"secret comment")
    path = tmp_path / "f.db"
    FeedbackStore(path).add(ask(), [Image.open(source)], "a", "up")
    (jpeg,) = sqlite3.connect(path).execute("SELECT jpeg FROM pictures").fetchone()
    assert b"taken at home" not in jpeg and b"secret comment" not in jpeg and b"Exif" not in jpeg


def test_the_store_is_private_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "f.db"
    store = FeedbackStore(path, max_entries=1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.add(ask(), [RED], "a", "up")
    with pytest.raises(FeedbackFull):
        store.add(ask(), [RED], "b", "up")
    assert len(FeedbackStore(path)) == 1
    with pytest.raises(FeedbackFull):
        FeedbackStore(tmp_path / "g.db", max_bytes=1).add(ask(), [RED], "a", "up")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "f.db").write_text("not a database, only words that go on for a while" * 5)
    with pytest.raises(DataError, match="cannot be used"):
        FeedbackStore(tmp_path / "f.db")
    with pytest.raises(DataError):
        FeedbackStore(tmp_path / "missing" / "f.db")


@pytest.fixture(scope="module")
def client(
    make_tiny: Callable[..., VLM],
    served: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[httpx.Client]:
    """A tiny model's server that collects opinions."""
    from vlm.serve.settings import Settings

    with served(make_tiny(), Settings(feedback=tmp_path_factory.mktemp("opinions") / "f.db")) as client:
        yield client


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({}, 200, None),
        ({"correction": None, "verdict": "up"}, 200, None),
        ({"correction": "   "}, 422, "correction"),
        ({"correction": "\u2003\n"}, 422, "correction"),
        ({"answer": " \t"}, 422, "answer"),
        ({"verdict": "up"}, 422, "correction"),
    ],
)
def test_an_opinion_that_says_nothing_or_contradicts_itself_is_refused(
    client: httpx.Client, change: dict[str, Any], status: int, param: str | None
) -> None:
    messages = [{"role": "user", "content": "What is it?"}]
    opinion = {"messages": messages, "answer": "a dog", "verdict": "down", "correction": "a cat"}
    reply = client.post("/v1/feedback", json={"consent": True, **opinion, **change})
    assert reply.status_code == status
    if param:
        assert reply.json()["error"]["param"] == param
