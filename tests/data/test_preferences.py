"""Preference pairs from JSON lines and from the server's database: the same ones, or one clear error."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.conversation import Conversation, ImageSlot, PreferencePair, Turn
from vlm.data.preferences import read_preferences
from vlm.errors import DataError
from vlm.images import open_picture
from vlm.serve.feedback import FeedbackStore

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Opinions of every kind: corrections, thumbs that pair and thumbs that do not, several turns."""
    store = FeedbackStore(tmp_path / "f.db")
    asked = Conversation.ask([RED], "What is it?")
    store.add(asked, [RED], "a dog", "down", "a “cat”")
    store.add(asked, [RED], "red", "up")
    store.add(asked, [RED], "green", "down")
    store.add(Conversation.ask([BLUE], "What is it?"), [BLUE], "green", "down")
    store.add(Conversation.ask([RED], "Why?"), [RED], "because", "up")
    later = Conversation(
        (RED, BLUE),
        (
            Turn("user", ("first ", ImageSlot(0), "then ", ImageSlot(1))),
            Turn("assistant", ("two colours",)),
            Turn("user", ("which?",)),
        ),
    )
    store.add(later, [RED, BLUE], "none", "down", "red and blue")
    return tmp_path / "f.db"


def plain(pair: PreferencePair) -> tuple[Any, ...]:
    pictures = tuple(open_picture(image).sha256 for image in pair.conversation.images)
    return pair.id, pictures, pair.conversation.turns, pair.chosen, pair.rejected


def test_the_database_and_its_export_are_the_same_pairs(database: Path, tmp_path: Path) -> None:
    exported = FeedbackStore(database).export(tmp_path / "out")
    direct = read_preferences(database)
    lines = read_preferences(tmp_path / "out" / "pairs.jsonl")
    assert len(direct.pairs) == exported.pairs == 4
    assert direct.unused == exported.unused == 2
    assert [plain(pair) for pair in direct.pairs] == [plain(pair) for pair in lines.pairs]
    assert [plain(pair) for pair in read_preferences(tmp_path / "out").pairs] == [
        plain(pair) for pair in lines.pairs
    ]
    found = {(pair.chosen, pair.rejected) for pair in direct.pairs}
    assert found == {("a “cat”", "a dog"), ("red", "a dog"), ("red", "green"), ("red and blue", "none")}
    assert sum(len(pair.conversation.turns) == 3 for pair in direct.pairs) == 1


def test_the_database_is_read_beside_a_server_and_not_written(database: Path) -> None:
    before = database.read_bytes()
    with sqlite3.connect(database) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert len(read_preferences(database).pairs) == 4
        writer.rollback()
    assert database.read_bytes() == before


def test_pairs_may_be_written_by_hand(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    row = {"images": ["red.png"], "question": "What is it?", "chosen": " red ", "rejected": "blue"}
    (tmp_path / "mine.jsonl").write_text("\n" + json.dumps(row) + "\r\n\n")
    (pair,) = read_preferences(tmp_path / "mine.jsonl").pairs
    assert pair.conversation == Conversation.ask([tmp_path / "red.png"], "What is it?")
    assert (pair.chosen, pair.rejected, pair.id) == ("red", "blue", "mine-2")


GOOD = {"images": ["red.png"], "question": "What?", "chosen": "a", "rejected": "b"}
ASKED = [{"role": "user", "parts": [{"image": 0}, {"text": "What?"}]}]
TURNS = {"images": ["red.png"], "turns": ASKED, "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({**GOOD, "chosen": "b"}), "the same answer"),
        (json.dumps({**GOOD, "rejected": 5}), "rejected is no text"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "chosen"}), "chosen is missing"),
        (json.dumps({**GOOD, "images": ["absent.png"]}), r"picture missing \(absent.png\)"),
        (json.dumps({**GOOD, "images": "red.png"}), "images is no list"),
        (json.dumps({**GOOD, "question": ["What?"]}), "question is no text"),
        (json.dumps({**TURNS, "turns": []}), "neither question nor turns"),
        (json.dumps({**TURNS, "turns": [{"role": "system", "parts": []}]}), "neither the user's"),
        (json.dumps({**TURNS, "turns": [{"role": "user"}]}), "no list of parts"),
        (json.dumps({**TURNS, "turns": [{"role": "user", "parts": ["What?"]}]}), "neither text nor image"),
        (json.dumps({**TURNS, "images": []}), "turns and images do not fit"),
        (json.dumps({**TURNS, "turns": [*ASKED, {"role": "assistant", "parts": []}]}), "not the user's"),
    ],
)
def test_a_bad_line_is_one_error_with_its_file_and_line(tmp_path: Path, line: str, cause: str) -> None:
    RED.save(tmp_path / "red.png")
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(TURNS)}\n{line}\n{{also broken\n")
    with pytest.raises(DataError, match=cause) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_a_blank_answer_makes_no_pair_and_spoils_no_file(database: Path, tmp_path: Path) -> None:
    with sqlite3.connect(database) as db:  # as servers stored it that did not refuse it
        db.execute("UPDATE feedback SET correction = '   ' WHERE correction = 'red and blue'")
    exported = FeedbackStore(database).export(tmp_path / "out")
    direct = read_preferences(database)
    assert len(direct.pairs) == len(read_preferences(tmp_path / "out").pairs) == exported.pairs == 3
    assert direct.unused == exported.unused == 3
    RED.save(tmp_path / "red.png")
    blank = [{**GOOD, "chosen": " "}, {**GOOD, "rejected": ""}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [GOOD, *blank, TURNS])))
    mine = read_preferences(tmp_path / "mine.jsonl")
    assert (len(mine.pairs), mine.unused) == (2, 2)


def test_files_that_are_neither(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_preferences(tmp_path / "absent.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_preferences(tmp_path / "x.jsonl")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE things (name TEXT)")
    with pytest.raises(DataError, match="no feedback database"):
        read_preferences(tmp_path / "other.db")
    (tmp_path / "cut.db").write_bytes((tmp_path / "other.db").read_bytes()[:200])
    with pytest.raises(DataError, match="no feedback database"):
        read_preferences(tmp_path / "cut.db")


def test_a_picture_that_the_database_has_lost(database: Path) -> None:
    with sqlite3.connect(database) as db:
        db.execute("DELETE FROM pictures")
    with pytest.raises(DataError, match="picture of an opinion is missing"):
        read_preferences(database)
