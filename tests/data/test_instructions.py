"""LLaVA's instruction files as they are handed out: rows about no picture, system turns, several pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.conversation import ImageSlot
from vlm.data.check import check_source
from vlm.data.main import main
from vlm.data.readers import read_source
from vlm.errors import DataError

Save = Callable[..., Path]


def row(id: str, *said: str, image: Any = None, system: str = "") -> dict[str, Any]:
    """A row in the layout of llava_v1_5_mix665k.json, where a text has no key "image"."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    turns = ([{"from": "system", "value": system}] if system else []) + turns
    return {"id": id, **({"image": image} if image is not None else {}), "conversations": turns}


TEXTS = [row(f"wgByO4Y_{n}", "Name a prime.", f"{n}", "Another one?", "7") for n in range(30)]


@pytest.fixture
def mix(tmp_path: Path, save: Save) -> Path:
    """Four rows about pictures among thirty that are about none."""
    for n in range(4):
        save(tmp_path / "coco" / "train2017" / f"{n:012}.jpg", n)
    names = [f"coco/train2017/{n:012}.jpg" for n in range(4)]
    rows = [
        row("a", "<image>\nWhat is it?", "A box.", "And its colour?", "Red.", image=names[0]),
        row("b", "What is it?\n<image>", "A ball.", image=names[1]),
        row("c", "Look at <image>\nWhat is it?", "A cup.", image=names[2]),
        row("d", "<image>\n<image>\nWhich is red?", "The first.", image=names[:2]),
        row("e", "<image>\nWhat is it?", "A hat.", image=names[3], system="You are helpful."),
    ]
    path = tmp_path / "llava_mix.json"
    path.write_text(json.dumps([*rows[:2], *TEXTS, *rows[2:]]))
    return path


def test_a_mixture_is_learnt_as_far_as_it_is_about_pictures(
    mix: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading = read_source(mix)
    assert not reading.bad
    assert [text.where for text in reading.texts] == [f"llava_mix.json[{n}]" for n in range(2, 32)]
    with caplog.at_level(logging.WARNING, logger="vlm"):
        found = {example.id: example for example in reading.checked()}
    assert caplog.messages == [f"{mix}: no picture: 30 rows left out"]
    assert {id: example.answers for id, example in found.items()} == {
        "a": ("A box.",), "a@1": ("Red.",), "b": ("A ball.",), "c": ("A cup.",), "d": ("The first.",),
        "e": ("A hat.",),
    }  # fmt: skip
    assert found["b"].turns[0].parts == ("What is it?", ImageSlot(0))
    assert found["c"].turns[0].parts == ("Look at ", ImageSlot(0), "What is it?")
    assert found["d"].turns[0].parts == (ImageSlot(0), ImageSlot(1), "Which is red?")
    assert found["e"].turns[0].parts == ("You are helpful.\n", ImageSlot(0), "What is it?")


def test_the_check_counts_them_and_is_content(mix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(mix), "--samples", "0"]) == 0
    said = capsys.readouterr().out
    assert "6 examples, 4 pictures, 0 unusable rows" in said
    assert "no picture: 30 rows left out" in said
    assert check_source(mix).to_json()["parts"][0]["without_picture"] == 30


def test_rows_about_no_picture_do_not_hide_bad_ones(mix: Path) -> None:
    rows = json.loads(mix.read_text())
    mix.write_text(json.dumps([*rows, row("f", "<image>\nWhat?", "A dog.", image="gone.jpg")]))
    with pytest.raises(DataError, match=r"1 rows cannot be used: 1 x picture missing\. .*gone\.jpg"):
        read_source(mix).checked()


def test_a_file_about_no_picture_at_all_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps(TEXTS))
    with pytest.raises(DataError, match="none of its rows names a picture"):
        read_source(tmp_path / "text.json").checked()


def test_a_question_whose_picture_is_null_is_about_none(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "a.png", 1)
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "question": "What?", "answer": "a box"},
        {"image": None, "question": "2 + 2?", "answer": "4"},
        {"images": [], "question": "3 + 3?", "answer": "6"},
        {"image": None, "text": "a ball"},
        {"question": "What?", "answer": "a cup"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_source(tmp_path / "x.jsonl")
    assert [example.answers for example in reading.examples] == [("a box",)]
    assert [text.where for text in reading.texts] == ["x.jsonl:2", "x.jsonl:3"]
    assert dict(reading.causes) == {"no picture named": 1, "no picture column": 1}


def test_pictures_without_a_placeholder_keep_their_order(tmp_path: Path, save: Save) -> None:
    for n in range(3):
        save(tmp_path / f"{n}.png", n)
    names = [f"{n}.png" for n in range(3)]
    rows = [
        row("one", "Compare <image> well.", "Alike.", image=names),
        row("none", "Why?", "So.", image=names),
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    one, none = read_source(tmp_path / "x.json").examples
    slots = (ImageSlot(0), ImageSlot(1), ImageSlot(2))
    assert one.turns[0].parts == ("Compare ", *slots, " well.")
    assert none.turns[0].parts == (*slots, "Why?")


@pytest.mark.parametrize("place", ["train2017", "images", "../images", "../train2017"])
@pytest.mark.parametrize("table", ["json", "jsonl"])
def test_bare_names_are_looked_for_where_coco_has_them(
    tmp_path: Path, save: Save, place: str, table: str
) -> None:
    """LLaVA-Instruct-150K names COCO's pictures without their folder."""
    (tmp_path / "set").mkdir()
    save((tmp_path / "set" / place).resolve() / "000000033471.jpg", 1)
    one = row("000000033471", "<image>\nWhat?", "A bus.", image="000000033471.jpg")
    path = tmp_path / "set" / f"llava_instruct_150k.{table}"
    path.write_text(json.dumps([one] if table == "json" else one))
    reading = read_source(path)
    assert not reading.bad and [example.answers for example in reading.examples] == [("A bus.",)]
