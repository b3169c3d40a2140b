"""Rows, parts and annotation files as people bring them; every bad row named; every value text."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vlm.conversation import ImageSlot
from vlm.data.example import Example
from vlm.data.readers import read_source
from vlm.data.rows import RowError, as_text, examples_from_row, load_json
from vlm.data.sources import read_dataset
from vlm.data.tables import csv_rows
from vlm.errors import DataError


def answers(examples: list[Example]) -> list[tuple[str, ...]]:
    return [example.answers for example in examples]


def test_json_numbers_and_truth_are_read_as_they_are_written() -> None:
    row = load_json('{"a": 1.50, "b": 7, "c": true, "d": null, "e": "007", "f": NaN}')
    assert {k: as_text(v) for k, v in row.items()} == {
        "a": "1.50", "b": "7", "c": "true", "d": "", "e": "007", "f": "NaN",
    }  # fmt: skip


@given(
    st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), min_size=1))
)
def test_csv_cells_come_back_as_they_were(cells: list[str]) -> None:
    import csv

    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([["name", "text"], *([f"n{i}", cell] for i, cell in enumerate(cells))])
    rows = [row for _, row in csv_rows(buffer.getvalue(), "t.csv")]
    assert rows == [{"name": f"n{i}", "text": cell} for i, cell in enumerate(cells)]


def test_bad_rows_are_counted_by_cause_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    extra = [
        "{broken",
        "[1, 2]",
        json.dumps({"file_name": "absent.png", "text": "x"}),
        json.dumps({"file_name": "000.png", "text": "  "}),
        json.dumps({"file_name": "000.png", "question": "what?", "answer": ""}),
        json.dumps({"text": "no picture"}),
        json.dumps({"file_name": "https://example.org/a.png", "text": "x"}),
        json.dumps({"file_name": "000.png", "label": "x"}),
    ]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, *extra]) + "\n")
    reading = read_source(folder)
    assert len(reading.examples) == 10
    assert dict(reading.causes) == {
        "not JSON": 1, "not a JSON object": 1, "picture missing": 1, "empty text": 1, "empty answer": 1,
        "no picture column": 1, "picture is a web address": 1, "no text or question column": 1,
    }  # fmt: skip
    assert "metadata.jsonl:13: picture missing (absent.png)" in [str(row) for row in reading.bad]
    with pytest.raises(DataError, match="8 rows cannot be used: .*1 x picture missing"):
        reading.checked()
    many = [json.dumps({"file_name": "000.png", "text": f"t{n}"}) for n in range(200)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, *many, "{broken"]) + "\n")
    with caplog.at_level(logging.WARNING, logger="vlm"):
        assert len(read_dataset(folder)) == 210
    assert "1 x not JSON" in caplog.text and "metadata.jsonl:211" in caplog.text


def test_a_csv_with_ragged_rows_and_repeated_columns(tmp_path: Path, save: Callable[..., Path]) -> None:
    save(tmp_path / "a.png", 1)
    text = 'file_name,caption,caption\na.png,"one, two",three\na.png,one\n\na.png,"un"closed,x\na.png,,y\n'
    (tmp_path / "t.csv").write_text("\ufeff" + text, encoding="utf-8")
    reading = read_source(tmp_path / "t.csv")
    assert answers(reading.examples) == [("one, two", "three"), ("y",)]
    assert sorted(reading.causes) == ["not CSV", "wrong number of cells"]


def test_one_part_is_divided_by_picture(folder: Path) -> None:
    ids = {
        split: {e.id for e in read_dataset(folder, split=split)} for split in ("train", "train-rest", "dev")
    }
    assert (len(ids["train"]), len(ids["train-rest"]), len(ids["dev"])) == (10, 8, 2)
    assert ids["train-rest"] | ids["dev"] == ids["train"]
    with pytest.raises(DataError, match="one part only"):
        read_dataset(folder, split="test")


def test_parts_are_folders(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    root.mkdir()
    folder.rename(root / "train")
    assert len(read_dataset(root, split="train")) == 10
    assert len(read_dataset(root, split="dev")) == 2, "without a dev part, a fifth of the pictures"
    (root / "validation").mkdir()
    (root / "train" / "000.png").rename(root / "validation" / "000.png")
    (root / "validation" / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "x"}\n')
    lines = (root / "train" / "metadata.jsonl").read_text().splitlines()
    (root / "train" / "metadata.jsonl").write_text("\n".join(lines[1:]))
    assert [e.answers for e in read_dataset(root, split="val")] == [("x",)]
    assert len(read_dataset(root, split="train-rest")) == len(read_dataset(root, split="train")) == 9
    with pytest.raises(DataError, match="no part called test; it has dev, train"):
        read_dataset(root, split="test")


def llava(*turns: tuple[str, str], image: Any = "0.png") -> dict[str, Any]:
    return {"id": "x", "image": image, "conversations": [{"from": who, "value": text} for who, text in turns]}


def found(row: dict[str, Any]) -> list[Example]:
    return examples_from_row(row, "row", lambda value: as_text(value))


def test_llava_conversations() -> None:
    row = llava(("human", "<image>\nWhat is it?"), ("gpt", "A dog."), ("human", "Colour?"), ("gpt", "Brown."))
    first, second = found(row)
    assert first.turns[0].parts == (ImageSlot(0), "What is it?")
    assert (first.id, first.answers, second.id, second.answers) == ("x", ("A dog.",), "x@1", ("Brown.",))
    assert [turn.text for turn in second.turns] == ["What is it?", "A dog.", "Colour?"]
    (two,) = found(llava(("human", "Compare <image> and <image>"), ("gpt", "Same"), image=["0.png", "1.png"]))
    assert two.turns[0].parts == ("Compare ", ImageSlot(0), " and ", ImageSlot(1))
    (bare,) = found(llava(("human", "What?"), ("gpt", "A dog")))
    assert bare.turns[0].parts == (ImageSlot(0), "What?")
    (literal,) = found(llava(("human", "<image>\nwhat does <image> mean?"), ("gpt", "It says <image>.")))
    assert literal.turns[0].text == "what does <image> mean?" and literal.answers == ("It says <image>.",)
    chat = {
        "images": ["0.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat"},
        ],
    }
    assert found(chat)[0].turns[0].parts == (ImageSlot(0), "What?")


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (llava(("human", "<image>\nWhat?")), "no answer"),
        (llava(("gpt", "Hello"), ("human", "What?")), "conversation does not begin with a question"),
        (llava(("robot", "Hello")), "unknown speaker"),
        ({"image": "0.png", "conversations": "text"}, "conversation is no list"),
        ({"image": "0.png", "question": "What?"}, "no answer column"),
        ({"image": "0.png", "question": "What?", "answer": " "}, "empty answer"),
        ({"image": "", "text": "x"}, "no picture named"),
        ({"image": None, "text": "x"}, "no picture named"),
        ({"image": "", "question": "What?", "answer": "x"}, "no picture named"),
        (llava(("human", "<image>\nWhat?"), ("gpt", "A dog"), image=None), "no picture named"),
        ({"conversations": llava(("human", "<image>\nWhat?"))["conversations"]}, "no picture column"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], cause: str) -> None:
    with pytest.raises(RowError) as error:
        found(row)
    assert error.value.cause == cause


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["image", "text", "question", "answers", "conversations", "id"]), JSON)
)
def test_any_row_gives_examples_or_a_cause(row: dict[str, Any]) -> None:
    try:
        examples = found(row)
    except RowError as error:
        assert error.cause
        return
    assert examples or not row.get("image"), "only a row about no picture gives nothing"
    assert all(example.answers and all(example.answers) for example in examples)


def test_coco_captions_and_vqa(tmp_path: Path, save: Callable[..., Path]) -> None:
    save(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg", 1)
    notes = tmp_path / "annotations"
    notes.mkdir()
    captions = {
        "images": [
            {"id": 9, "file_name": "COCO_train2014_000000000009.jpg"},
            {"id": 10, "file_name": "gone.jpg"},
        ],
        "annotations": [{"image_id": 9, "caption": text} for text in ("A dog.", "Dog!")],
    }
    (notes / "captions_train2014.json").write_text(json.dumps(captions))
    reading = read_source(notes / "captions_train2014.json")
    assert answers(reading.examples) == [("A dog.", "Dog!")] and dict(reading.causes) == {
        "picture missing": 1
    }
    questions = {
        "data_subtype": "train2014",
        "questions": [{"question_id": 9000, "image_id": 9, "question": "How many?"}],
    }
    ten = [{"answer": "2", "answer_id": n} for n in range(9)] + [{"answer": "3", "answer_id": 9}]
    (notes / "v2_OpenEnded_questions.json").write_text(json.dumps(questions))
    with pytest.raises(DataError, match="no annotations file"):
        read_source(notes / "v2_OpenEnded_questions.json")
    table = {"annotations": [{"question_id": 9000, "image_id": 9, "answers": ten, "answer_type": "number"}]}
    (notes / "v2_annotations.json").write_text(json.dumps(table))
    (example,) = read_source(notes / "v2_OpenEnded_questions.json").checked()
    assert example.answers == ("2",) * 9 + ("3",), "every annotator counts"
    assert example.meta["answer_type"] == "number"


def test_karpathy_split_files(tmp_path: Path, save: Callable[..., Path]) -> None:
    images = []
    for n, split in enumerate(["train", "restval", "val", "test"]):
        save(tmp_path / "images" / f"{n}.jpg", n)
        images.append({"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"caption {n}"}]})
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    parts = {
        split: read_dataset(tmp_path / "dataset_x.json", split=split) for split in ("train", "dev", "test")
    }
    assert {split: [e.answers[0] for e in examples] for split, examples in parts.items()} == {
        "train": ["caption 0", "caption 1"], "dev": ["caption 2"], "test": ["caption 3"],
    }  # fmt: skip


def test_what_is_no_source_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "absent", "is no file"),
        (tmp_path / "notes.txt", "is expected"),
        (tmp_path / "empty", r"no metadata\.csv"),
    ):
        with pytest.raises(DataError, match=message):
            read_source(source)
