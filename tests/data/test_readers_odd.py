"""Tables as people write them, and files that are not what they should be: read, or named in one line."""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.config import CAPTION_PROMPT
from vlm.data.readers import Reading, read_source
from vlm.data.streams import hub_name
from vlm.data.tables import whole_csv
from vlm.errors import DataError

Save = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, save: Save) -> Path:
    """A folder of three pictures p0.png to p2.png, and the same in `sub`."""
    for n in range(3):
        save(tmp_path / f"p{n}.png", n)
        save(tmp_path / "sub" / f"p{n}.png", n)
    return tmp_path


def said(reading: Reading) -> list[tuple[str, ...]]:
    return [example.answers for example in reading.examples]


PLAIN = "file_name,text\np0.png,a 0\np1.png,a 1\np2.png,a 2\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Metadata.CSV", PLAIN),
        ("Labels.CSV", PLAIN),
        ("labels.TSV", PLAIN.replace(",", "\t")),
        ("metadata.csv", "\n\r\n\n" + PLAIN),
        ("metadata.csv", PLAIN.replace(",", ";")),
        ("metadata.csv", PLAIN.replace(",", "\t")),
        ("metadata.csv", '"file_name";"text"\n' + PLAIN.split("\n", 1)[1].replace(",", ";")),
        ("metadata.csv", PLAIN.replace("file_name,text", "File_Name,Text")),
        ("metadata.csv", PLAIN.replace("file_name", "File Name")),
        ("metadata.csv", "sep=;\r\n" + PLAIN.replace(",", ";")),
        ("metadata.csv", "sep=|\n" + PLAIN.replace(",", "|")),
        ("metadata.csv", PLAIN.replace(".png", ".PNG")),
        ("metadata.csv", PLAIN.replace("\np", "\nsub\\p")),
        ("metadata.JSONL", "".join(f'{{"Image": "p{n}.png", "Caption": "a {n}"}}\n' for n in range(3))),
    ],
)
def test_tables_as_people_write_them(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text, newline="")
    reading = read_source(root)
    assert not reading.bad
    assert said(reading) == [("a 0",), ("a 1",), ("a 2",)]


def test_several_answers_of_a_cell_are_a_json_list(root: Path) -> None:
    (root / "metadata.csv").write_text(
        "file_name,question,answers\n"
        'p0.png,what?,"[""red"", ""rose""]"\n'
        "p1.png,what?,\"['red', 'rose']\"\np2.png,what?,red\n"
    )
    reading = read_source(root)
    assert said(reading) == [("red", "rose"), ("red",)]
    assert [str(row) for row in reading.bad] == ["metadata.csv:3: list is not JSON (['red', 'rose'])"]
    (root / "metadata.csv").write_text('file_name,question,answer\np0.png,where?,"[0.1, 0.2]"\n')
    assert said(read_source(root)) == [("[0.1, 0.2]",)], "one answer, whatever it looks like"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("name,label", "no picture column (name, label; wanted: file_name)"),
        (
            "file_name,label",
            "no text or question column (file_name, label; wanted: text, or question and answer)",
        ),
        ("file_name,question", "no answer column (file_name, question; wanted: answer)"),
    ],
)
def test_a_missing_column_is_named(root: Path, header: str, told: str) -> None:
    (root / "metadata.csv").write_text(f"{header}\np0.png,red\n")
    assert [str(row) for row in read_source(root).bad] == [f"metadata.csv:2: {told}"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"train.csv": PLAIN, "val.csv": PLAIN}, r"several tables; name one of them: train\.csv, val\.csv"),
        ({"annotations/captions.json": "{}"}, r"tables in its folders: annotations/captions\.json"),
        ({"notes.txt": "x"}, r"write a metadata\.csv with the columns file_name and text, or file_name, "),
        ({"x.json": '{"file_name": "p0.png"}\n{"file_name": "p1.png"}\n'}, r"to end in \.jsonl"),
        ({"metadata.csv": "\udcfc"}, r"save it as UTF-8 \(in Excel: CSV UTF-8\)"),
    ],
)
def test_a_folder_that_cannot_be_read_says_what_would_help(
    root: Path, files: dict[str, str], told: str
) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=told):
        read_source(root)


def test_a_separator_in_a_caption_is_none(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name,text\np0.png,one; two; three\n")
    assert said(read_source(root)) == [("one; two; three",)]


@pytest.mark.parametrize(("stored", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_composed_either_way(tmp_path: Path, save: Save, stored: Any, written: Any) -> None:
    save(tmp_path / unicodedata.normalize(stored, "bäld.png"), 1)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\n" + unicodedata.normalize(written, "bäld.png") + ",x\n", encoding="utf-8"
    )
    assert said(read_source(tmp_path)) == [("x",)]


def test_a_place_is_the_line_that_a_row_begins_in(root: Path) -> None:
    (root / "metadata.csv").write_text('\nfile_name,text\np0.png,"a\nb\nc"\n\nabsent.png,x\np1.png\n')
    reading = read_source(root)
    assert [example.id for example in reading.examples] == ["metadata.csv:3"]
    assert [row.where for row in reading.bad] == ["metadata.csv:7", "metadata.csv:8"]


def test_a_row_may_hold_a_caption_and_a_question(root: Path) -> None:
    (root / "metadata.csv").write_text(
        "file_name,text,question,answer\np0.png,a box,what?,red\np1.png,,what?,blue\np2.png,a ball,,\n"
    )
    found = [(e.images[0].name, e.turns[0].text, e.answers) for e in read_source(root).examples]  # type: ignore[union-attr]
    assert found == [
        ("p0.png", "what?", ("red",)),
        ("p0.png", CAPTION_PROMPT, ("a box",)),
        ("p1.png", "what?", ("blue",)),
        ("p2.png", CAPTION_PROMPT, ("a ball",)),
    ]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"image": "a" * 5000, "text": "long"}, "picture missing"),
        ({"image": "p0.png\0", "text": "x"}, "picture missing"),
        ({"image": "p0.png", "messages": [{"role": "user", "content": "q"}]}, "no answer"),
    ],
)
def test_odd_rows_are_bad_rows(root: Path, row: dict[str, Any], cause: str) -> None:
    (root / "x.jsonl").write_text(json.dumps(row))
    assert dict(read_source(root / "x.jsonl").causes) == {cause: 1}


def test_parts_of_a_chat_may_be_plain_text(root: Path) -> None:
    talk = [{"role": "user", "content": ["<image>", "what?", 3]}, {"role": "assistant", "content": "a box"}]
    (root / "x.jsonl").write_text(json.dumps({"image": "p0.png", "messages": talk}))
    (example,) = read_source(root / "x.jsonl").examples
    assert (example.turns[0].text, example.answers) == ("what?3", ("a box",))


def test_json_without_end_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="deep.json is not JSON"):
        read_source(tmp_path / "deep.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["metadata.csv", ""])
def test_what_may_not_be_read_is_one_error(root: Path, name: str) -> None:
    (root / "metadata.csv").write_text(PLAIN)
    (root / name).chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            read_source(root)
    finally:
        (root / name).chmod(0o700)


def test_nothing_below_a_header_is_said_to_be_so(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(DataError, match="no row was found in it"):
        read_source(root).checked()


def test_a_slip_in_a_path_is_no_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_name("d/nope") is None
    assert hub_name("owner/name") == "owner/name"
    with pytest.raises(DataError, match="d/nope is no file, no folder"):
        read_source("d/nope")


def coco(folder: Path, *, images: list[Any], annotations: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


@pytest.mark.parametrize(
    ("table", "right", "wrong"),
    [
        ("set", "set/images", "set"),
        ("set", "set", "."),
        ("set", "set/images", "."),
        ("set", "set/photos", "."),
        ("annotations", "images", "."),
        ("annotations", "val2014", "."),
        ("annotations", ".", "other"),
        ("annotations", None, "other"),
    ],
)
def test_a_coco_picture_is_the_sets_own(
    tmp_path: Path, save: Save, table: str, right: str | None, wrong: str
) -> None:
    save(tmp_path / wrong / "0.png", 9)
    if right is not None:
        save(tmp_path / right / "0.png", 1)
    path = coco(tmp_path / table, images=[{"id": 0, "file_name": "0.png"}], annotations=[
        {"image_id": 0, "caption": "a box"}])  # fmt: skip
    reading = read_source(path)
    if right is None:
        assert dict(reading.causes) == {"picture missing": 1}
    else:
        assert [example.images for example in reading.examples] == [(tmp_path / right / "0.png",)]


def test_odd_entries_of_coco_are_counted(root: Path) -> None:
    path = coco(
        root,
        images=[{"id": 0, "file_name": "p0.png"}, "odd", None],
        annotations=[{"image_id": 0, "caption": "a box"}, "odd", None],
    )
    reading = read_source(path)
    assert said(reading) == [("a box",)]
    assert dict(reading.causes) == {"not a JSON object": 4}


def test_a_folder_of_vqa_is_read_and_its_odd_entries_counted(tmp_path: Path, save: Save) -> None:
    for n in range(5):
        save(tmp_path / "images" / f"{n}.png", n)
    asked = [{"question_id": n, "image_id": n, "question": f"what {n}?"} for n in range(4)]
    asked += [{"question_id": 4, "image_id": 4}, "odd"]  # type: ignore[list-item]
    notes: list[Any] = [
        {"question_id": 0, "answers": [{"answer": "red"}, {"answer": "rose"}]},
        {"question_id": 1, "multiple_choice_answer": "blue"},
        {"question_id": 2, "answers": None},
        {"question_id": 3, "answers": "red"},
        {"question_id": 4, "answers": [{"answer": "red"}]},
        "odd",
    ]
    (tmp_path / "x_questions.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "x_annotations.json").write_text(json.dumps({"annotations": notes}))
    reading = read_source(tmp_path)
    assert said(reading) == [("red", "rose"), ("blue",)]
    assert dict(reading.causes) == {"empty answer": 2, "empty question": 1, "not a JSON object": 1}


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.TGZ", "w:gz")])
def test_everything_after_the_first_dot_is_a_members_column(
    tmp_path: Path, draw: Callable[..., Image.Image], name: str, mode: Any
) -> None:
    def png(seed: int) -> bytes:
        buffer = io.BytesIO()
        draw(seed).save(buffer, format="PNG")
        return buffer.getvalue()

    members = [
        ("k0.png", png(0)), ("k0.seg.png", png(1)), ("k0.question.txt", b"what?"), ("k0.answer.txt", b"red"),
        ("k1.seg.png", png(1)), ("k1.png", png(2)), ("k1.txt", b"a box"),
        ("k2.seg.png", png(1)), ("k2.txt", b"no picture"),
    ]  # fmt: skip
    with tarfile.open(tmp_path / name, mode) as tar:
        for member, content in members:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for source in (tmp_path, tmp_path / name):
        reading = read_source(source)
        assert [(e.images, e.turns[0].text, e.answers) for e in reading.examples] == [
            ((png(0),), "what?", ("red",)),
            ((png(2),), CAPTION_PROMPT, ("a box",)),
        ]
        assert dict(reading.causes) == {"no picture column": 1}


@pytest.mark.parametrize("end", ['{},a 24" desk', '{},24"', '{},"a desk"', '{},24""'])
def test_every_line_that_an_open_quote_takes_is_a_bad_row(root: Path, end: str) -> None:
    names = [f"p{n % 3}.png" for n in range(40)]
    lines = [f"{name},a desk" for name in names]
    lines[10], lines[29] = f'{names[10]},"desk', end.format(names[29])
    last = 41 if end.endswith('""') else 31
    (root / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n", encoding="utf-8")
    reading = read_source(root)
    assert len(reading.examples) == 51 - last
    assert dict(reading.causes) == {"quote is not closed": last - 11}
    assert str(reading.bad[0]) == (
        f"metadata.csv:12: quote is not closed (lines 12 to {last} read as one row)"
    )
    with pytest.raises(DataError, match="at most 1% may be"):
        reading.checked()


@pytest.mark.parametrize(
    "text",
    [
        'file_name,text\np0.png,"a desk\np1.png,24"\np2.png,a bed\n',
        'text,file_name\n"a desk,p0.png\n24"" desk,p1.png"\na bed,p2.png\n',
        'file_name,text\np0.png,"a desk\np1.png,"24"\np2.png,a bed\n',
    ],
)
def test_one_row_that_an_open_quote_takes_is_seen(root: Path, text: str) -> None:
    (root / "metadata.csv").write_text(text)
    reading = read_source(root)
    assert said(reading) == [("a bed",)]
    assert [row.where for row in reading.bad] == ["metadata.csv:2", "metadata.csv:3"]


def test_rows_without_picture_names_that_an_open_quote_takes_are_seen(tmp_path: Path) -> None:
    lines = [f"{n},yes" for n in range(30)]
    lines[5], lines[25] = '5,"yes', '25,no"'
    (tmp_path / "answers.csv").write_text("\n".join(["question_id,answer", *lines]))
    with pytest.raises(DataError, match=r"answers\.csv:7: quote is not closed \(lines 7 to 27 "):
        whole_csv(tmp_path / "answers.csv")


@pytest.mark.parametrize(
    "text",
    [
        "a bed, wide\nand a desk, small",
        "\n".join(["a line, and more"] * 9),
        "p1.jpg\n\nand p1.png, too, with",
        "x\ny",
    ],
)
def test_a_text_over_several_lines_is_no_open_quote(root: Path, text: str) -> None:
    (root / "metadata.csv").write_text(f'file_name,text\r\np0.png,"{text}"\r\np1.png,a bed\r\n', newline="")
    reading = read_source(root)
    assert not reading.bad
    assert said(reading) == [(text,), ("a bed",)]
